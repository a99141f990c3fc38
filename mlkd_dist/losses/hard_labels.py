"""The task's own labels as targets."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mlkd_dist.trace import Trace
from mlkd_kernels.rows import drop_masked

ROWS = "label"
SCOPE = "trace"
READS = ("logits",)
TEACHER = False
PROJECTION = False


def hard_labels(student: Trace, *, label_smoothing: float = 0.0) -> Tensor:  # [B] or [B, L]
    """-log Q[label], Q = softmax(student.logits) over the last dimension; reads no teacher.

    Smoothed by s: (1 - s) of it and s times the mean of -log Q over the classes. 0 where the label
    is -100, and still part of the graph. One logit is a regression: (z - label)^2 (our reading).
    Raises ValueError where labels are missing or not shaped as the logits without their last
    dimension, and for smoothing outside [0, 1) or of a regression.
    """
    assert student.logits is not None
    logits, labels = student.logits, student.labels
    if labels is None or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"hard_labels: logits of shape {tuple(logits.shape)} need labels of shape "
            f"{tuple(logits.shape[:-1])}; given: "
            f"{None if labels is None else tuple(labels.shape)}."
        )
    regression = logits.shape[-1] == 1
    if not 0 <= label_smoothing < 1 or (regression and label_smoothing):
        raise ValueError(
            f"hard_labels: label_smoothing={label_smoothing} with {logits.shape[-1]} classes; it "
            "must be at least 0 and below 1, and 0 for a regression (one logit)."
        )
    keep = labels != -100
    logits = drop_masked(logits, keep)
    if regression:
        return torch.where(keep, logits.squeeze(-1) - labels.to(logits.dtype), 0.0).square()
    rows = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=-100,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return rows.view(labels.shape)
