"""What a model says of tokens, for tasks with a row of logits per token."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mlkd_dist.tasks import Batch
from mlkd_dist.trace import Trace

# Rows of logits that lie in memory at once.
ROWS = 1024


def token_outputs(trace: Trace, batch: Batch) -> dict[str, Tensor]:
    """Of every token that counts: what the model says, the negative log-probability of the truth,
    and the truth."""
    labels, entering = (
        tensor.flatten(0, 1).index_select(0, batch.label_rows)
        for tensor in (batch.labels, trace.head_input)
    )
    said, losses = [], []
    with trace.head.opened(entering) as rows:
        for hidden, truth in zip(rows.hidden.split(ROWS), labels.split(ROWS), strict=True):
            logits = rows.of(hidden).logits()
            said.append(logits.argmax(-1).cpu())
            losses.append(cross_entropy(logits, truth, reduction="none").cpu())
    return {"token": torch.cat(said), "loss": torch.cat(losses), "label": labels.cpu()}


def accuracy(outputs: dict[str, Tensor]) -> float:
    return float((outputs["token"] == outputs["label"]).float().mean())


def mean_loss(outputs: dict[str, Tensor]) -> float:
    return float(outputs["loss"].double().mean())


def perplexity(outputs: dict[str, Tensor]) -> float:
    return float(outputs["loss"].double().mean().exp())


def same_token(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, float]:
    return {"same_token": float((student["token"] == teacher["token"]).float().mean())}
