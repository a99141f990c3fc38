"""A number for each text or text pair, as in STS-B."""

import math
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from mlkd_dist.tasks import IGNORE, BadRow, Batch, Decides, pad, tokens
from mlkd_dist.trace import Trace

LARGEST = torch.finfo(torch.float32).max


class Task:
    model_class = AutoModelForSequenceClassification
    reads = frozenset({"logits"})
    vocabulary = False
    decides = Decides("spearman")

    def __init__(self, settings: Any, data: Any):
        self.texts = [data.text] + ([data.text_pair] if data.text_pair else [])
        self.label = data.label
        self.columns = [*self.texts, self.label]

    def settings(self) -> dict[str, Any]:
        return {"kind": "regression", "columns": self.columns}

    def check(self, row: dict[str, Any]) -> None:
        label = row[self.label]
        # IGNORE is how a batch says that a label is not known.
        if not is_number(label) or label == IGNORE:
            raise BadRow(
                f"column {self.label!r}: {label!r} is not a number that can be learned; labels are "
                f"numbers that 32 bits hold, but for {IGNORE}",
                "correct the data, or set data.label to another column",
            )

    def encode(
        self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list]:
        texts = [rows[name] for name in self.texts]
        encoded = tokens(texts, tokenizer, truncation=True, max_length=max_length)
        return encoded | {"labels": [float(label) for label in rows[self.label]]}

    def collate(
        self, rows: list[dict[str, Any]], keep: list[bool], tokenizer: PreTrainedTokenizerBase
    ) -> Batch:
        kept = torch.tensor(keep)
        labels = torch.tensor([row["labels"] for row in rows]).masked_fill(~kept, IGNORE)
        return Batch(pad(rows, tokenizer), kept, labels=labels, label_keep=kept)

    def outputs(self, trace: Trace, batch: Batch) -> dict[str, Tensor]:
        said = trace.logits.float().squeeze(-1)
        return {"value": said[batch.keep].cpu(), "label": batch.labels[batch.keep].cpu()}

    def quality(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Correlations with the labels, as GLUE has it."""
        return compared(outputs["value"], outputs["label"])

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Mean squared error."""
        return {"loss": float((outputs["value"] - outputs["label"]).square().mean())}

    def agreement(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, float]:
        gap = student["value"] - teacher["value"]
        found = compared(student["value"], teacher["value"])
        return found | {"mse": float(gap.square().mean())}


def is_number(value: Any) -> bool:
    """That a float32 does not make infinite, and a float64 does not round where it is whole."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= (LARGEST if isinstance(value, float) else 2**53)


def compared(one: Tensor, other: Tensor) -> dict[str, float]:
    """Nothing where a correlation is not defined: fewer than two values, all the same, or one that
    is no number."""
    if min(len(one.unique()), len(other.unique())) < 2:
        return {}
    # Sums of squares of a large mean and a small spread need all digits.
    pair = one.double().numpy(), other.double().numpy()
    found = {
        "pearson": float(pearsonr(*pair).statistic),
        "spearman": float(spearmanr(*pair).statistic),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}
