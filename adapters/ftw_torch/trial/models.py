"""The user's own transformers model: loaded, its samples tokenized, one loss a sample."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto import modeling_auto

from .data import Row, Table
from .errors import TrialError

__all__ = ["Encoded", "UserModel", "load"]

IGNORED = -100  # the label of a token that is not learned, for torch and transformers alike


@dataclass(frozen=True)
class Encoded:
    """A tokenized sample; ``labels`` has an int a token for a language model, and a number for a classifier."""

    tokens: list[int]
    labels: list[int] | int | float


@dataclass
class UserModel:
    """A model with its tokenizer, as `ftw_torch.trial.run` needs them."""

    model: nn.Module
    tokenizer: Any
    classifier: bool
    max_length: int
    labels: dict[str, int] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """Return a copy of the model."""
        return copy.deepcopy(self.model)

    def encode(self, table: Table) -> tuple[list[Encoded], list[str]]:
        """Return the tokenized samples of a file, and what was left out.

        Raises
        ------
        TrialError
            If a classifier finds no labels, or labels that the model does not have.
        """
        if self.classifier and "label" not in table.columns:
            raise TrialError(
                f"{table.path}: no label column, which a classifier needs; it has {', '.join(table.columns)}"
            )
        if self.classifier and "completion" in table.columns:
            raise TrialError(f"{table.path}: a classifier reads the columns text and label, not prompt and completion")
        encoded = [self._encode(table.path, row) for row in table.rows]
        found = [one for one in encoded if one is not None]
        if not found:
            raise TrialError(f"{table.path}: no row has a token to learn from")
        gone = len(encoded) - len(found)
        notes = (
            [f"{table.path}: {gone} rows are left out: nothing to predict in {self.max_length} tokens"] if gone else []
        )
        cut = sum(len(one.tokens) >= self.max_length for one in found)
        if cut:
            notes.append(f"{table.path}: {cut} of {len(found)} samples fill {self.max_length} tokens or are cut there")
        return found, notes

    def _encode(self, path: str, row: Row) -> Encoded | None:
        """Return a sample, None if there is nothing to learn from it."""
        tokens = self._tokens(row.text)
        if self.classifier:
            return Encoded(tokens[: self.max_length], self._label(path, row)) if tokens else None
        labels = [*tokens]
        if row.completion is not None:
            rest = self._tokens(row.completion, add_special_tokens=False)
            end = self.tokenizer.eos_token_id
            rest += [] if end is None else [end]
            labels = [IGNORED] * len(tokens) + rest
            tokens = tokens + rest
        tokens, labels = tokens[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            return None
        return Encoded(tokens, labels)

    def _tokens(self, text: str, **options: Any) -> list[int]:
        return list(self.tokenizer(text, truncation=True, max_length=self.max_length, **options)["input_ids"])

    def _label(self, path: str, row: Row) -> int | float:
        config: Any = self.model.config
        count = config.num_labels
        if count == 1:
            try:
                return float(row.label)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                raise TrialError(f"{path}: line {row.line}: label {row.label!r} is not a number") from None
        if str(row.label) in self.labels:
            return self.labels[str(row.label)]
        try:
            number = float(row.label)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if number not in range(count):
            names = ", ".join(list(self.labels)[:8])
            raise TrialError(
                f"{path}: line {row.line}: label {row.label!r} is none of the model's {count}: 0 to {count - 1}, "
                f"or {names}"
            )
        return int(number)

    def collate(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return the batch, padded on the right: tokens and mask (n, t), labels (n, t) or (n,)."""
        length = max(len(one.tokens) for one in samples)
        pad = self.tokenizer.pad_token_id
        batch = {
            "input_ids": torch.tensor([one.tokens + [pad] * (length - len(one.tokens)) for one in samples]),
            "attention_mask": torch.tensor(
                [[1] * len(one.tokens) + [0] * (length - len(one.tokens)) for one in samples]
            ),
        }
        labels = [
            one.labels + [IGNORED] * (length - len(one.labels)) if isinstance(one.labels, list) else one.labels
            for one in samples
        ]
        return {**batch, "labels": torch.tensor(labels)}

    def per_sample_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return each sample's loss (n,): the mean over its tokens for a language model."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits, labels = logits.float(), batch["labels"]
        if labels.ndim == 2:  # (n, t): each token predicts the next one
            labels = labels[:, 1:]
            each = F.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )  # (n, t - 1)
            return each.sum(1) / labels.ne(IGNORED).sum(1)
        if labels.is_floating_point():
            return F.mse_loss(logits[:, 0], labels, reduction="none")
        return F.cross_entropy(logits, labels, reduction="none")


def load(name: str, *, lora: bool, device: str | None, max_length: int) -> UserModel:
    """Load a causal language model or a sequence classifier.

    Parameters
    ----------
    name : str
        A folder with a saved model, or a name on the hub.
    lora : bool
        Train adapters of rank 8 on all linear layers (``peft``) instead of all parameters.
    device : str or None
        Where to train; a GPU if there is one.
    max_length : int
        Tokens of a sample, at most; longer ones are cut.

    Raises
    ------
    TrialError
        If there is no such model, it is of another kind, or has no tokenizer.
    """
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise TrialError(f"--model {name}: no config.json in it; give a folder that save_pretrained wrote")
    config = _loaded(name, lambda: transformers.AutoConfig.from_pretrained(name))
    names = list(getattr(config, "architectures", None) or [])
    if any(one in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values() for one in names):
        classifier = True
    elif any(one in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for one in names):
        classifier = False
    else:
        raise TrialError(
            f"--model {name}: its architectures are {names}; expected a causal language model or a sequence "
            "classifier: load it once as the one you mean to train, and save_pretrained it"
        )
    tokenizer = _loaded(name, lambda: transformers.AutoTokenizer.from_pretrained(name), "a tokenizer")
    kind: Any = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM
    model = _loaded(name, lambda: kind.from_pretrained(name, config=config, dtype=torch.float32))
    if not tokenizer("The")["input_ids"]:  # transformers makes an empty one where the files are missing
        raise TrialError(f"--model {name}: its tokenizer knows no text; save it beside the model with save_pretrained")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise TrialError(f"--model {name}: its tokenizer has neither a pad nor an eos token; set one")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    if lora:
        model = _with_lora(model, classifier)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    positions = getattr(config, "max_position_embeddings", None) or max_length
    labels = {str(label): int(number) for label, number in (getattr(config, "label2id", None) or {}).items()}
    return UserModel(model.to(device), tokenizer, classifier, min(max_length, positions), labels)


def _loaded(name: str, loading: Callable[[], Any], what: str = "a model") -> Any:
    """Return what ``loading`` does, with the first sentence of an error."""
    try:
        return loading()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise TrialError(f"--model {name}: {what} cannot be loaded: {first}") from error


def _with_lora(model: nn.Module, classifier: bool) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise TrialError("--lora needs the package peft: pip install peft") from None
    kind = peft.TaskType.SEQ_CLS if classifier else peft.TaskType.CAUSAL_LM
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type=kind)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted
