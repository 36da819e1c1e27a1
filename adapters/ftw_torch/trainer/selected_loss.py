"""The loss that is selected on: the trainer's own of each sample, in the unit asked for, and the check that it is."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ftw_torch.errors import SelectionError
from ftw_torch.packing import PackedBatch

from .documents import entries, in_one_row, replaced
from .losses import token_counts
from .notes import PoolNotes
from .own_loss import causal, own_losses, quiet, refuse_another_loss, smoothing_shifts
from .pairs import pairs, takes_pairs
from .ragged import Counts, cut, joined, known_counts
from .step import Ranks

__all__ = ["SelectedLoss", "numbered"]

logger = logging.getLogger("ftw_torch.trainer.mixin")

_SCALE = "_ftw_scale"  # (n,), travels with a batch whose losses are sums over tokens
_ROWS = "_ftw_rows"  # a list of ints, travels with the pool: which of its samples these are


class SelectedLoss:
    """A trainer's losses, one a sample.

    Parameters
    ----------
    trainer : FilterThenWeightMixin
    own : callable, optional
        The user's ``(model, inputs) -> (n,)``.
    unit : {"sample", "token"}
    ragged : callable, optional
        Which entries have several rows a sample.
    """

    def __init__(self, trainer: Any, own: Callable[..., Tensor] | None, unit: str, ragged: Counts | None) -> None:
        self.trainer, self.own, self.unit, self.ragged = trainer, own, unit, ragged
        self.notes = PoolNotes()
        self._shared = False  # whether the loss has a term of the whole batch
        self._compared: nn.Module | None = None  # whose losses were compared with the trainer's own
        self._shift: bool | None = None  # whether its loss shifts the labels

    def cut(self, inputs: Mapping[str, Any]) -> Any:
        """Return a batch of samples: documents of a row, pairs, or with the rows of an entry cut by sample."""
        if takes_pairs(self.trainer):
            return pairs(inputs)
        if (found := in_one_row(inputs)) is not None:
            return found
        config = getattr(self.trainer.accelerator.unwrap_model(self.trainer.model), "config", None)
        return cut(inputs, known_counts(inputs, config) if self.ragged is None else self.ragged(inputs))

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the losses (n,) of a batch."""
        scale, rows = (entries(inputs).get(name) for name in (_SCALE, _ROWS))
        inputs = replaced(inputs, **{_SCALE: None, _ROWS: None})
        counts = None if scale is None else self.counts(inputs)
        with self.trainer.compute_loss_context_manager():
            if self.own is not None:
                own: Tensor = self.own(model, inputs if isinstance(inputs, PackedBatch) else joined(inputs))
                return own
            with quiet(self.trainer) as wrote:
                found, _ = own_losses(self.trainer, model, inputs)
        if rows is not None:
            self.notes.add(rows, wrote)
            self._shared = self._shared or found.shared is not None
        return found.rows if scale is None or counts is None else found.rows * (scale * counts).to(found.rows.dtype)

    def begin(self) -> None:
        """Forget whether the last pool's loss had a term of the whole batch."""
        self._shared = False

    def shared(self) -> Callable[[Any], Tensor | None] | None:
        """Return what gives the term of a batch's loss that belongs to none of its samples; None if there is none."""
        return self._shared_term if self._shared else None

    def _shared_term(self, inputs: Any) -> Tensor | None:
        trainer, inputs = self.trainer, replaced(inputs, **{_SCALE: None, _ROWS: None})
        with trainer.compute_loss_context_manager(), quiet(trainer), torch.enable_grad():
            return own_losses(trainer, trainer.accelerator.unwrap_model(trainer.model), inputs)[0].shared

    def counts(self, inputs: Any) -> Tensor | None:
        """Return the number of labels of each sample (n,), if they are tokens."""
        return token_counts(inputs, shift=bool(self._shift))

    def scaled(self, inputs: Any, items: Tensor | int | None, steps: int) -> Any:
        """Return the batch with the factor (n,) that makes sums over tokens a loss of about one sample."""
        if self.unit == "sample" or inputs is None:
            return inputs
        counts = self.counts(inputs)
        if counts is None:
            raise ValueError("loss_unit='token' needs labels (n, t) of ints; use loss_unit='sample'")
        smoother = self.trainer.label_smoother
        if smoother is not None and "num_items_in_batch" not in inspect.signature(type(smoother).__call__).parameters:
            items = None  # before transformers 5.15 smoothing divides by the labels of the batch itself
        n = len(counts)
        total = counts.sum() if items is None else torch.as_tensor(items, device=counts.device) / steps
        if items is not None and getattr(self.trainer.args, "average_tokens_across_devices", False):
            total = total / self.trainer.accelerator.num_processes
        return replaced(inputs, **{_SCALE: (n / total.clamp(min=1)).to(torch.float32).expand(n)})

    def compare(self, model: nn.Module, pool: Any, ranks: Ranks, *, overridden: bool) -> None:
        """Raise if the losses selected on are not the trainer's own; see `refuse_another_loss`."""
        trainer, own = self.trainer, self.own is not None or overridden
        if self._compared is model:
            return
        self._shift, wrong = causal(model), None
        if self._shift and not own and trainer.label_smoother is not None and not smoothing_shifts(trainer, model):
            logger.warning(
                "label smoothing does not shift the labels of %s, which is not among transformers' causal language "
                "models: the model learns to repeat its input; shift them yourself, or train without smoothing",
                type(model).__name__,
            )
        if not own:
            try:
                some, counts = refuse_another_loss(trainer, model, pool)
                shifted, full = (token_counts(some, shift=shift) for shift in (True, False))
                if counts is not None and shifted is not None and full is not None and not torch.equal(shifted, full):
                    self._shift = torch.equal(counts, shifted)
            except Exception as error:  # of which the other processes must hear
                wrong = error
        if ranks.exchange is not None:
            every = [text for text in ranks.texts("" if wrong is None else str(wrong)) if text]
            if every and wrong is None:
                wrong = SelectionError(f"another process failed: {every[0]}")
        if wrong is not None:
            raise wrong
        self._compared = model


def numbered(pool: Any, n: int) -> Any:
    """Return a pool whose n samples know their numbers, by which notes of passes over them are put together."""
    return replaced(pool, **{_ROWS: list(range(n))})
