"""The loss of each sample, as the trainer's own ``compute_loss`` returns it for that sample alone."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ftw_torch import batches
from ftw_torch.capture.passes import uncompiled
from ftw_torch.errors import SelectionError

from .documents import IGNORED, Documents, entries
from .owners import ByRow, ByToken, Owners
from .pairs import PAIRED
from .ragged import joined
from .tracking import Followed, PerSample

__all__ = ["LossError", "alone", "causal", "own_losses", "quiet", "refuse_another_loss", "smoothing_shifts"]

IN_A_ROW = (
    "do documents of a row look at each other? Attention must stay within a document (position_ids that restart, no "
    "attention_mask, use_cache=False), and the first label of each must be -100:"
)
REMEDY = "give the loss of each sample: per_sample_loss=(model, inputs) -> (n,)"


class LossError(SelectionError, ValueError):
    """The loss of each sample alone cannot be had from the trainer's own."""


def own_losses(trainer: Any, model: nn.Module, inputs: Any) -> tuple[Followed, Tensor | None]:
    """Return the loss of a batch with those of its samples, and the number of labels of each (n,) if known.

    Raises
    ------
    LossError
        If the loss cannot be taken apart, naming the trainer's or the model's class.
    """
    n = batches.size(inputs, "batch")
    laid_out = joined(inputs)
    paired = PAIRED in entries(inputs)
    by_token = isinstance(inputs, Documents)
    owners: Owners = ByToken(inputs) if by_token else ByRow(n, _label_sizes(trainer, model, laid_out))
    mode = PerSample(owners)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())  # a compiled graph hides the functions that are followed
        stack.enter_context(_apart(trainer, model, mode))
        called: Any = _Unfused(model, mode, paired) if _is_trl(trainer) else model
        with mode:
            loss = trainer.compute_loss(called, dict(laid_out))
    found = mode.of(loss)
    if found is None or tuple(found.rows.shape) != (n,):
        parts = "the tokens of documents" if by_token else f"{n} equal parts"
        raise LossError(
            f"the loss that {_named(trainer, model)} returns for {n} samples cannot be taken apart into theirs: it "
            f"does not come from torch's loss functions over {parts} by scaling and adding (a fused or "
            f"compiled loss, entries left out by a mask, a loss between samples); {REMEDY}"
        )
    return found, mode.counts


def alone(trainer: Any, model: nn.Module, inputs: Any) -> Tensor:
    """Return the trainer's own loss of a batch, as it is."""
    loss: Tensor = trainer.compute_loss(model, joined(inputs))
    return loss


@torch.no_grad()
def refuse_another_loss(trainer: Any, model: nn.Module, inputs: Any) -> tuple[Any, Tensor | None]:
    """Raise if a sample's loss in a batch is not what the trainer's own ``compute_loss`` returns for it alone.

    Dropout is off for the comparison. Returns the m samples that were compared, and the number of labels of each (m,),
    if known, as the loss counts them.

    Raises
    ------
    LossError
        With both numbers.
    """
    n = batches.size(inputs, "batch")
    places = sorted({0, n // 2, n - 1})
    some = batches.take(inputs, torch.tensor(places))
    why = IN_A_ROW if isinstance(inputs, Documents) else "does its loss depend on other samples?"
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with quiet(trainer), trainer.accelerator.autocast(), uncompiled():
            found, counts = own_losses(trainer, model, some)
            wrong: LossError | None = None
            for i, place in enumerate(places):
                row = batches.take(some, torch.tensor([i]))
                one = own_losses(trainer, model, row)[0]
                theirs = alone(trainer, model, row).double()
                ours = found.rows[i].double() + (0.0 if one.shared is None else one.shared.double())
                if counts is not None and int(counts[i]) == 0:
                    continue
                if not bool(torch.isfinite(theirs)) or not bool(torch.isfinite(ours)):
                    continue
                if abs(float(ours - theirs)) > _tolerance(model) * max(1.0, abs(float(theirs))):
                    wrong = wrong or LossError(  # after the last: processes that gather layers make as many calls
                        f"sample {place} of the pool has a loss of {float(ours):.6g} among others, and of "
                        f"{float(theirs):.6g} alone, as {_named(trainer, model)} returns it: {why} {REMEDY}",
                        samples=[place],
                    )
            if wrong is not None:
                raise wrong
    finally:
        for module, was in training.items():
            module.training = was
    return some, counts


@contextmanager
def quiet(trainer: Any) -> Iterator[SimpleNamespace]:
    """Call a trainer's ``compute_loss`` without a trace in its log; yields what it wrote down."""
    wrote = SimpleNamespace(metrics=None, tokens=0, logs=[])
    held, tokens = getattr(trainer, "_metrics", None), getattr(trainer, "_total_train_tokens", None)
    if isinstance(held, Mapping):
        trainer._metrics = wrote.metrics = {mode: defaultdict(list) for mode in held}
    accelerator, gathers = trainer.accelerator, ("gather", "gather_for_metrics")
    own = {name: vars(accelerator)[name] for name in gathers if name in vars(accelerator)}
    for name in gathers:  # processes need not make as many calls
        setattr(accelerator, name, lambda x, *_, **__: x)
    before, trainer._ftw_quiet = trainer._ftw_quiet, wrote
    try:
        yield wrote
    finally:
        trainer._ftw_quiet = before
        for name in gathers:
            delattr(accelerator, name)
            if name in own:
                setattr(accelerator, name, own[name])
        if isinstance(held, Mapping):
            trainer._metrics = held
        if tokens is not None:
            wrote.tokens = trainer._total_train_tokens - tokens
            trainer._total_train_tokens = tokens


def causal(model: nn.Module) -> bool:
    """Return whether a model's loss shifts the labels."""
    base = _base(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    return isinstance(base, PreTrainedModel) and base.loss_function is ForCausalLMLoss


def smoothing_shifts(trainer: Any, model: nn.Module) -> bool:
    """Return whether the trainer's label smoothing shifts a causal model's labels: for the classes of a list only."""
    base = _base(model)
    return _is_trl(trainer) or type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


# ----------------------------------------------------------------------------------------------------------------------
# What stands in the way of a loss's parts


@contextmanager
def _apart(trainer: Any, model: nn.Module, mode: PerSample) -> Iterator[None]:
    """Call loss functions of the user's own on one sample at a time."""
    held: list[tuple[Any, str, Any]] = []
    missing = object()

    def put(where: Any, name: str, value: Any) -> None:
        held.append((where, name, vars(where).get(name, missing)))
        setattr(where, name, value)

    try:
        if trainer.compute_loss_func is not None:
            put(trainer, "compute_loss_func", mode.by_rows(trainer.compute_loss_func))
        if trainer.label_smoother is not None:
            put(trainer, "label_smoother", _smoother(trainer.label_smoother))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                name, own = _own_loss_function(module)
                if own is not None:
                    put(module, name, mode.by_rows(own))
        yield
    finally:
        for where, name, value in reversed(held):
            if value is missing:
                delattr(where, name)
            else:
                setattr(where, name, value)


def _own_loss_function(model: Any) -> tuple[str, Any]:
    """Return a model's ``loss_function`` if it is not one of transformers, and the attribute that holds it."""
    kind = inspect.getattr_static(type(model), "loss_function", None)
    if kind is not PreTrainedModel.loss_function:  # the class's own: as a property followed through torch's functions
        return "loss_function", None if isinstance(kind, property) else model.loss_function
    function: Any = vars(model).get("_loss_function")
    if function is None:
        function = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    known = getattr(function, "__module__", "").startswith("transformers.")
    return "_loss_function", None if known else function


def _smoother(smoother: Any) -> Callable[..., Tensor]:
    """Return transformers' label smoothing as a loss of torch's."""

    def smooth(outputs: Any, labels: Tensor, shift_labels: bool = False, **_: Any) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        logits = logits.flatten(0, -2)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        return F.cross_entropy(
            logits, labels.flatten(), ignore_index=smoother.ignore_index, label_smoothing=smoother.epsilon
        )

    return smooth


def _label_sizes(trainer: Any, model: nn.Module, inputs: Mapping[str, Any]) -> frozenset[int] | None:
    """Return how many entries a target may have for each sample: its labels, shifted or after virtual tokens."""
    names = {*(getattr(trainer, "label_names", None) or ()), "labels", "shift_labels"}
    given = [inputs[name] for name in names if isinstance(inputs.get(name), Tensor) and inputs[name].ndim]
    each = {x.numel() // x.shape[0] for x in given}
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return frozenset(k + v - s for k in each for v in (0, virtual) for s in (0, 1) if k + v > s) if each else None


class _Unfused:
    """A model whose fused head, which TRL adds, is the plain one: the capture reads its weights."""

    def __init__(self, model: nn.Module, mode: PerSample, paired: bool) -> None:
        self._model, self._mode, self._paired = model, mode, paired

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """Return the model's outputs, or what TRL reads of the fused head's."""
        follow = self._mode.halve if self._paired else self._mode.lead
        if not fused_lm_head:
            outputs = self._model(*args, **inputs)
            if self._paired:
                follow(outputs.logits)
            return outputs
        labels = inputs.pop("labels", None)
        shifted = inputs.pop("shift_labels", None)
        outputs = self._model(*args, **inputs)
        logits = outputs.logits
        if shifted is None:
            logits, shifted = logits[:, -labels.shape[1] : -1], labels[:, 1:]
        mask = shifted != IGNORED
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        with self._mode.paused():
            losses = F.cross_entropy(logits.transpose(1, 2), shifted, ignore_index=IGNORED, reduction="none")  # (n, t)
            with torch.no_grad():
                log_p = logits.detach().log_softmax(-1)
                entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~mask, 0)
                top = (log_p.argmax(-1) == shifted) & mask
                mean = logits.detach().mean(-1).masked_fill(~mask, 0)
        self._mode.counts = None if self._paired else self._mode.owners.sums(mask)
        return SimpleNamespace(
            log_probs=follow(-losses),
            entropy=entropy,
            is_top1=top,
            label_mask=follow(mask),
            mean_logits=mean,
            aux_loss=getattr(outputs, "aux_loss", None),
            loss=None,
        )


def _base(model: Any) -> Any:
    """Return the model inside adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_trl(trainer: Any) -> bool:
    return any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)


def _named(trainer: Any, model: nn.Module) -> str:
    base = _base(model)
    return f"{type(trainer).compute_loss.__qualname__} with {type(base).__name__}"


def _tolerance(model: nn.Module) -> float:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    coarse = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return 5e-2 if coarse or any(dtype.itemsize < 4 for dtype in dtypes) else 1e-3
