"""What a step calls: operations that PyTorch dispatches, those of them that start a kernel, and the host's time.

Counts repeat exactly, whatever else the machine does; a step of many small layers is bound by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Calls", "calls_of"]

_VIEWS = """
promote_types result_type can_cast is_nonzero item view _unsafe_view reshape expand permute transpose t slice select
unsqueeze squeeze detach alias as_strided split split_with_sizes unbind _reshape_alias empty empty_like empty_strided
new_empty new_empty_strided chunk diagonal lift_fresh view_as is_same_size _local_scalar_dense movedim unsafe_split
"""
VIEWS = frozenset(_VIEWS.split())  # start no kernel


class Calls(NamedTuple):
    """What one step called."""

    ops: int
    kernels: int
    host_ms: float  # processor time of the process; on a GPU of the calls alone


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call, and run it."""
        self.ops += 1
        self.kernels += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def calls_of(step: Callable[[], Any], rounds: int = 3) -> Calls:
    """Return what a step calls, and the least host time of some rounds; it should be warm."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    counter = _Counter()
    with counter:
        step()
    return Calls(counter.ops, counter.kernels, 1e3 * min(seconds))
