"""Classes of texts or of text pairs, as in GLUE."""

from typing import Any

import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from mlkd_dist.tasks import IGNORE, BadRow, Batch, Decides, pad, tokens
from mlkd_dist.trace import Trace


class Task:
    model_class = AutoModelForSequenceClassification
    reads = frozenset({"logits"})
    vocabulary = False
    decides = Decides("accuracy")

    def __init__(self, settings: Any, data: Any):
        self.texts = [data.text] + ([data.text_pair] if data.text_pair else [])
        self.label = data.label
        self.columns = [*self.texts, self.label]
        self.classes = settings.labels

    def settings(self) -> dict[str, Any]:
        return {"kind": "classification", "columns": self.columns, "classes": self.classes}

    def check(self, row: dict[str, Any]) -> None:
        label = row[self.label]
        if isinstance(label, bool) or not isinstance(label, int):
            raise BadRow(
                f"column {self.label!r}: {label!r} is not a class number; labels are 0, 1, 2, ...",
                "correct the data, or set data.label to another column",
            )
        if label < -1:
            raise BadRow(
                f"label {label} is below 0 and not -1, which marks an unknown one",
                f"correct the column {self.label!r}",
            )
        if self.classes is not None and label >= self.classes:
            raise BadRow(
                f"label {label} is outside the model's {self.classes} classes (0 to "
                f"{self.classes - 1})",
                f"correct the column {self.label!r}, use a model with more classes (task.labels)",
            )

    def encode(
        self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list]:
        texts = [rows[name] for name in self.texts]
        encoded = tokens(texts, tokenizer, truncation=True, max_length=max_length)
        return encoded | {"labels": rows[self.label]}

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

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Cross-entropy, of the rows whose label is known."""
        known = outputs["label"] >= 0
        if not known.any():
            return {}
        return {"loss": float(nll_loss(outputs["log_prob"][known], outputs["label"][known]))}

    def agreement(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, float]:
        p, q = teacher["log_prob"], student["log_prob"]
        return {
            "same_class": float((student["class"] == teacher["class"]).float().mean()),
            "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        }
