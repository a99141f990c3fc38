"""One file per task; the file name is `task.kind`. A task knows its columns, its model class, how
text becomes a batch, which rows of the logits count, and how well a model does it.

Every task file has a class `Task(settings: TaskConfig, data: DataConfig)` with

    columns                       raw columns it reads
    label_keys                    the keys of a label that holds keys and values; may be left out
    longest                       column -> characters that a text may have; may be left out, as
                                  where texts are cut at max_length
    redraws                       True: a row is another one in every epoch; may be left out
    model_class                   the transformers Auto class of its models
    reads                         what an evaluation takes from a trace
    vocabulary                    whether its models have a row of logits per token
    settings()                    what the encoding depends on, for the cache key
    check(row)                    BadRow for a raw row that no tokenizer could make good
    encode(rows, tokenizer, max_length)    raw columns -> token columns; BadRow where one of them is
                                  at fault, ValueError where all are
    collate(rows, keep, tokenizer)         rows -> Batch
    outputs(trace, batch)         per sample results of one batch, a dict of tensors on the CPU
    quality(outputs)              how well the model does by the labels: name -> number
    loss(outputs)                 {"loss": the mean loss by the labels}; nothing without any
    decides                       Decides: by which of these numbers one student is the best
    agreement(student, teacher)   how alike two models' outputs are: name -> number

and, where models may be asked to answer the prompts of its rows,

    prompted                      whether these rows have prompts; may be left out
    examples(row)                 (prompt, completion) of an encoded row, as token numbers
    answered(prompt, said)        the encoded row of another completion
    answer_quality(said, meant)   how well a model answers, of texts: name -> number
"""

import importlib
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlkd_dist.models.head import TopKRows

IGNORE = -100
# What no tokenizer takes for text: NUL, and halves of surrogate pairs.
BROKEN = re.compile("[\x00\ud800-\udfff]")


class BadRow(ValueError):
    """A row of the data that cannot be used: what is wrong, and what to do about it."""

    def __init__(self, wrong: str, remedy: str):
        super().__init__(f"{wrong}; {remedy}.")
        self.wrong, self.remedy = wrong, remedy


class Decides(NamedTuple):
    """The measure by which one student of a run is better than another."""

    measure: str
    higher: bool = True
    # Of `agreement`, since there are no labels; else of `quality`.
    by_teacher: bool = False


@dataclass
class Said:
    """What a teacher said of a batch, before it was asked again: of a Trace, these parts."""

    logits: Tensor | None  # as in a trace
    top_k: TopKRows | None  # of Batch.label_rows
    states: dict[str, Tensor] = field(default_factory=dict)  # [B, L, D] or [B, D], see stored.py

    def to(self, device: torch.device, non_blocking: bool = False) -> "Said":
        def move(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        states = {name: move(tensor) for name, tensor in self.states.items()}
        return Said(move(self.logits), move(self.top_k), states)


@dataclass
class Batch:
    """One micro-batch of one process."""

    # What the model's forward takes; and, where several documents lie in one sequence,
    # "documents": their number within it, -1 at padding.
    inputs: dict[str, Tensor]
    keep: Tensor  # [B] bool, False for a sample that only fills the batch
    labels: Tensor | None  # [B] or [B, L], -100 where ignored
    label_keep: Tensor  # [B] or [B, L] bool, which rows of the logits count
    rows: list[dict[str, Any]] | None = None  # as encoded, where an evaluation looks at them again
    # [n] the places of those that count in labels. Found where the batch is made: on a GPU it would
    # be waited for.
    label_rows: Tensor | None = None
    # What a teacher said of it before.
    stored: Said | None = None

    def __post_init__(self) -> None:
        if self.label_rows is None:
            self.label_rows = self.label_keep.flatten().nonzero().squeeze(1)

    @property
    def mask(self) -> Tensor:  # [B, L] bool
        """Tokens that count: real ones of samples that count."""
        return self.inputs["attention_mask"].bool() & self.keep.unsqueeze(1)

    @property
    def samples(self) -> Tensor:  # scalar
        """How many samples count; each document of a sequence is one."""
        documents = self.inputs.get("documents")
        return (self.keep if documents is None else self.keep * (documents.amax(1) + 1)).sum()

    @property
    def labelled(self) -> Tensor:  # scalar
        """How many rows of the logits count and have a label that is known."""
        if self.labels is None:
            return self.label_keep.sum() * 0
        return (self.label_keep & (self.labels != IGNORE)).sum()

    @property
    def sample_mean(self) -> Tensor:  # [B, L]
        """The weight of each token in the mean over its sample."""
        weight, documents = self.mask.float(), self.inputs.get("documents")
        if documents is None:
            return weight / weight.sum(1, keepdim=True).clamp_min(1)
        document = documents.clamp_min(0)
        lengths = torch.zeros_like(weight).scatter_add(1, document, weight)
        return weight / lengths.gather(1, document).clamp_min(1)

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        inputs = {name: move(tensor) for name, tensor in self.inputs.items()}
        labels, label_keep = move(self.labels), move(self.label_keep)
        label_rows, stored = move(self.label_rows), move(self.stored)
        return Batch(inputs, move(self.keep), labels, label_keep, self.rows, label_rows, stored)


def load(kind: str) -> Any:
    return importlib.import_module(f"mlkd_dist.tasks.{kind}").Task


def tokens(texts: list[list[str]], tokenizer: Any, **options: Any) -> dict[str, list]:
    """Of columns of texts, one or two. BadRow where a text has no tokens at all."""
    encoded = dict(tokenizer(*texts, **options))
    for text, ids in zip(texts[0], encoded["input_ids"], strict=True):
        if not ids:
            raise BadRow(f"{text[:40]!r} has no tokens", "correct it or remove the row")
    return encoded


def pad(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
    """Token columns, padded to the longest of the rows on the tokenizer's side."""
    names = [name for name in tokenizer.model_input_names if name in rows[0]]
    columns = {name: [row[name] for row in rows] for name in names}
    return dict(tokenizer.pad(columns, padding=True, return_tensors="pt"))
