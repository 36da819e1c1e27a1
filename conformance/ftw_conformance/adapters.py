"""Adapters."""
from __future__ import annotations
from typing import Any
class Adapter: pass
class TrainingStep: pass
def register_adapter(): pass
def names(): return []
def verify(*a: Any, **k: Any) -> Any: return []
