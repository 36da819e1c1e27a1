"""A pass by a plan: module hooks that keep inputs and gradient edges, one call of autograd, no function mode.

What makes it safe is the graph itself. After each forward it is walked from the losses: every edge into a trained
parameter must come from inside the firing of a module that the plan knows. A use anywhere else (a function of a
parameter, another branch, a gradient penalty) is seen in the step in which it happens, whatever came before, and the
step goes back to discovery.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook

from ftw import Dense, OuterProduct, Rows
from ftw.gradients import Record
from ftw_torch import batches
from ftw_torch.records.dtypes import promoted
from ftw_torch.records.join import merge

from .functions import transformed
from .passes import Passes
from .plan import Plan, Site

__all__ = ["Departure", "Firing", "fire", "pattern", "records_of", "replayed"]

INSIDE = 24  # nodes of one firing: a norm of elementary functions has nine


class Departure(Exception):  # noqa: N818
    """A step that the plan does not describe, with what was different."""


class Firing(NamedTuple):
    """One call of a module: its factors."""

    site: Site
    inputs: Tensor  # (n, ..., d_in), or row numbers (n, ...)
    output_grads: Tensor  # (n, ..., d_out)
    shared: bool = False  # by all samples, each of which was given a copy of the output


class _Call(NamedTuple):
    site: Site
    inputs: Tensor
    version: int
    before: Node | None  # of the input
    after: Node
    edge: Any
    shared: bool


class _Recorder:
    """Notes the calls of a plan's modules while it is installed, for all modules at once."""

    def __init__(self, plan: Plan, samples: int) -> None:
        self.sites, self.shared, self.samples = plan.sites, plan.shared, samples
        self.calls: list[_Call] = []
        self.odd: str | None = None
        self.over = False  # the forward is
        self.recomputed = False

    def __call__(self, module: Any, args: Any, out: Any) -> Any:
        """Run after the forward of any module; return its output, one for each sample, where all share one."""
        site = self.sites.get(id(module))
        if site is None:
            return None
        if self.over:
            self.recomputed = True
        elif len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(out, Tensor) or transformed():
            self.odd = f"a {type(module).__name__} is called in an unusual way"
        elif out.requires_grad and out.grad_fn is not None:
            x, before = args[0], args[0].grad_fn
            shared = site.kind == "rows" and self._is_shared(module, x)
            if shared:
                x, out = (y.expand(self.samples, *y.shape[x.ndim - 1 :]) for y in (x, out))
            after: Any = out.grad_fn
            self.calls.append(_Call(site, x, x._version, before, after, get_gradient_edge(out), shared))
            return out if shared else None
        return None

    def _is_shared(self, module: Any, x: Tensor) -> bool:
        """Return whether row numbers (t,) or (1, t) are positions, the same for all samples.

        Where there are as many positions as samples, what the module did with another number of samples decides.
        """
        if x.ndim == 0 or x.shape[0] == 0 or (x.ndim == 1 and x.shape[0] == 1) or x.ndim > 2:
            return False
        if x.ndim == 2 and x.shape[0] != 1:
            return False
        if x.shape[0] == self.samples:
            return id(module) in self.shared
        self.shared.add(id(module))
        return True


def fire(plan: Plan, passes: Passes, batch: Any, n: int, what: str) -> tuple[Tensor, list[Firing]]:
    """Return the losses (n,) of a batch, detached, and the firings behind them.

    Raises
    ------
    Departure
        If the pass is not as the plan says; nothing but random generators has moved.
    """
    recorder = _Recorder(plan, n)
    buffers = plan.buffers()
    versions = [x._version for x in buffers]
    with torch.enable_grad():
        handle = register_module_forward_hook(recorder)
        try:
            losses = _losses(recorder, passes, batch, n, what)
            recorder.over = True
            now = plan.buffers()
            if [id(x) for x in now] != [id(x) for x in buffers] or versions != [x._version for x in now]:
                raise Departure("the forward changes buffers")
            calls = _checked(recorder, losses, plan, n)
            grads = torch.autograd.grad(losses.sum(), [call.edge for call in calls], allow_unused=True)
        finally:
            handle.remove()
    if recorder.recomputed:
        raise Departure("a part of the forward is run again by the backward, as by a checkpoint")
    pairs = zip(calls, grads, strict=True)
    return losses.detach(), [Firing(call.site, call.inputs, g, call.shared) for call, g in pairs if g is not None]


def _losses(recorder: _Recorder, passes: Passes, batch: Any, n: int, what: str) -> Tensor:
    try:
        return passes.losses(batch, n, what)
    except Exception as error:
        if any(call.shared for call in recorder.calls):
            raise Departure(f"positions cannot be given to each sample: {type(error).__name__}: {error}") from error
        raise


def pattern(firings: list[Firing]) -> Any:
    """Return what a pass has in common with others over batches of other sizes."""
    return tuple((id(firing.site.module), firing.inputs.ndim, firing.shared) for firing in firings)


def _checked(recorder: _Recorder, losses: Tensor, plan: Plan, n: int) -> list[_Call]:
    """Return the calls that the losses depend on, or raise what is not as the plan says."""
    if recorder.odd is not None:
        raise Departure(recorder.odd)
    leaves: set[Node] = set()  # of parameters
    home: dict[Node, Node] = {}  # from each node inside a firing to that of its output
    for call in recorder.calls:
        name = type(call.site.module).__name__
        if call.inputs._version != call.version:
            raise Departure(f"the input of a {name} is changed after it was used")
        if call.inputs.shape[:1] != (n,) or call.inputs.ndim < (1 if call.site.kind == "rows" else 2):
            raise Departure(f"the input {tuple(call.inputs.shape)} of a {name} has no samples on axis 0")
        _enter(call, leaves, home)
    seen = _reached(losses, plan, leaves, home)
    return [call for call in recorder.calls if call.after in seen]


def _reached(losses: Tensor, plan: Plan, leaves: set[Node], home: dict[Node, Node]) -> set[Node]:
    """Return the nodes that the losses depend on; raise if a firing's inside is reached from elsewhere."""
    root: Any = losses.grad_fn
    seen: set[Node] = {root}
    stack = [root]
    while stack:
        node = stack.pop()
        above, here = node.next_functions, home.get(node)
        if node.name() == "CheckpointFunctionBackward":  # refuses to be asked for particular gradients
            raise Departure("a part of the forward is run again by the backward, as by a reentrant checkpoint")
        if not above and id(getattr(node, "variable", None)) in plan.names:
            raise Departure(f"{plan.names[id(node.variable)]!r} is used outside of its module")
        for up, _ in above:
            if up is None:
                continue
            if up in leaves:
                if here is None:
                    raise Departure(f"{plan.names[id(up.variable)]!r} is used outside of its module")
                continue
            inside = home.get(up)
            if inside is not None and inside is not up and inside is not here:
                raise Departure("what is computed inside of a module is used outside")
            if up not in seen:
                seen.add(up)
                stack.append(up)
    return seen


def _enter(call: _Call, leaves: set[Node], home: dict[Node, Node]) -> None:
    """Walk the nodes of one firing; add the leaves of its parameters, and the nodes on the way."""
    stack: list[Any] = [call.after]
    own, count = set(), 0
    while stack and count < INSIDE:
        node = stack.pop()
        known = home.setdefault(node, call.after)
        if known is not call.after:
            raise Departure(f"two calls of a {type(call.site.module).__name__} share a part of the graph")
        count += 1
        for up, _ in node.next_functions:
            if up is None or up is call.before:
                continue
            if up.next_functions:
                stack.append(up)
                continue
            leaf = getattr(up, "variable", None)
            if leaf is not None and leaf is not call.inputs:
                own.add(id(leaf))
                leaves.add(up)
    if own != call.site.own or stack:
        raise Departure(f"a {type(call.site.module).__name__} does not use its own parameters, or others too")


# ---------------------------------------------------------------------------------------------------------------------
# Records


def records_of(firing: Firing) -> list[tuple[str, Record]]:
    """Return the records of one firing, by parameter."""
    site, x, g, _ = firing
    n = x.shape[0]
    b = g.reshape(n, -1, g.shape[-1])  # (n, t, d_out)
    out: list[tuple[str, Record]] = []
    wide = promoted(b.dtype)
    if site.weight is not None:
        if site.kind == "rows":
            m: Any = site.module
            at = x.reshape(n, -1)  # (n, t)
            if m.padding_idx is not None:
                b = b.masked_fill((at == m.padding_idx)[:, :, None], 0.0)
            out.append((site.weight, Rows(at, b, m.num_embeddings)))
        else:
            a = x.reshape(n, -1, x.shape[-1])  # (n, t, d_in)
            if site.kind == "norm":
                out.append((site.weight, Dense((b.to(wide) * site.normalised(a)).sum(1))))
            else:
                out.append((site.weight, OuterProduct(a, b) if site.kind == "linear" else OuterProduct(b, a)))
    if site.bias is not None:
        out.append((site.bias, Dense(b.sum(1, dtype=wide))))
    return out


def replayed(plan: Plan, passes: Passes, batch: Any, what: str) -> tuple[Tensor, dict[str, Record], list[Firing]]:
    """Return the losses (n,) of a batch, its records, and the firings that they are made from."""
    losses, firings = fire(plan, passes, batch, batches.size(batch, what), what)
    parts: dict[str, list[Record]] = {}
    for firing in firings:
        for name, record in records_of(firing):
            parts.setdefault(name, []).append(record)
    return losses, {name: merge(found) for name, found in parts.items()}, firings
