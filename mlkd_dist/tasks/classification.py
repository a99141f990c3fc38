"""Classes of texts or of text pairs, as in GLUE."""

from typing import Any

import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from mlkd_dist.tasks import IGNORE, Batch, pad
from mlkd_dist.trace import Trace


class Task:
    model_class = AutoModelForSequenceClassification
    reads = frozenset({"logits"})
    vocabulary = False

    def __init__(self, settings: Any, data: Any):
        self.texts = [data.text] + ([data.text_pair] if data.text_pair else [])
        self.label = data.label
        self.columns = [*self.texts, self.label]

    def settings(self) -> dict[str, Any]:
        return {"kind": "classification", "columns": self.columns}

    def encode(
        self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list]:
        strange = [v for v in rows[self.label] if isinstance(v, bool) or not isinstance(v, int)]
        if strange:
            # One fraction makes numbers with a point of all of them; it is the one to be named.
            wrong = next((v for v in strange if isinstance(v, float) and v % 1), strange[0])
            raise ValueError(
                f"column {self.label!r}: {wrong!r} is not a class number; labels are 0, 1, 2, ... "
                f"Correct the data, or set data.label to another column."
            )
        encoded = dict(
            tokenizer(*(rows[name] for name in self.texts), truncation=True, max_length=max_length)
        )
        return encoded | {"labels": rows[self.label]}

    def check_labels(self, labels: list[int], classes: int) -> None:
        """ValueError for a label that the model's head has no class for; -1 marks an unknown one,
        as in GLUE."""
        for row, label in enumerate(labels, start=1):
            if not -1 <= label < classes:
                raise ValueError(
                    f"row {row}: label {label} is outside the model's {classes} classes (0 to "
                    f"{classes - 1}); "
                    f"correct the column {self.label!r}, or use a model with more classes "
                    f"(task.labels)."
                )

    def collate(
        self, rows: list[dict[str, Any]], keep: list[bool], tokenizer: PreTrainedTokenizerBase
    ) -> Batch:
        kept = torch.tensor(keep)
        labels = torch.tensor([row["labels"] for row in rows])
        labels = labels.masked_fill((labels < 0) | ~kept, IGNORE)
        return Batch(pad(rows, tokenizer), kept, labels=labels, label_keep=kept)

    def outputs(self, trace: Trace, batch: Batch) -> dict[str, Tensor]:
        logits = trace.logits.float()[batch.keep].cpu()
        return {
            "class": logits.argmax(-1),
            "log_prob": logits.log_softmax(-1),
            "label": batch.labels[batch.keep].cpu(),
        }

    def quality(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """F1 of class 1 where there are two classes, as GLUE has it, else the mean over classes."""
        known = outputs["label"] >= 0
        if not known.any():
            return {}
        truth, said = outputs["label"][known].numpy(), outputs["class"][known].numpy()
        average = "binary" if outputs["log_prob"].shape[-1] == 2 else "macro"
        return {
            "accuracy": float(accuracy_score(truth, said)),
            "f1": float(f1_score(truth, said, average=average, zero_division=0)),
            "mcc": float(matthews_corrcoef(truth, said)),
        }

    def agreement(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, float]:
        p, q = teacher["log_prob"], student["log_prob"]
        return {
            "same_class": float((student["class"] == teacher["class"]).float().mean()),
            "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        }
