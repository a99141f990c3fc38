"""The task's own labels as targets."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlkd_dist.models.head import HeadRows
from mlkd_dist.trace import Trace
from mlkd_kernels import linear_divergence
from mlkd_kernels.rows import drop_masked

ROWS = "label"
SCOPE = "trace"
READS = ("logits",)
TEACHER = False
PROJECTION = False
PACKED = True


def hard_labels(student: Trace, *, label_smoothing: float = 0.0) -> Tensor:  # [B] or [B, L]
    """-log Q[label], Q = softmax(student.logits) over the last dimension; reads no teacher.

    Smoothed by s: (1 - s) of it and s times the mean of -log Q over the classes. 0 where the label
    is -100, and still part of the graph; the mean is over the others. One logit is a regression:
    (z - label)^2 (our reading).
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


def over_vocabulary(
    student: HeadRows,
    teacher: None,
    row_weight: Tensor,  # [N]
    labels: Tensor,  # [N]
    *,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:  # scalar
    """The weighted sum of the rows of `hard_labels` over the student's whole vocabulary."""
    common = {
        "row_weight": row_weight,
        "student_logit_scale": student.scale,
        "student_soft_cap": student.soft_cap,
        "backend": backend,
    }
    read = student.hidden, student.weight
    total = linear_divergence(*read, None, None, kind="cross_entropy", labels=labels, **common)
    if not label_smoothing:
        return total
    # The mean of -log Q is the KL of the uniform distribution to Q, which a head of zeros makes,
    # and the logarithm of the number of classes.
    hidden, weight = read[0].new_zeros(len(read[0]), 1), read[1].new_zeros(len(read[1]), 1)
    uniform = linear_divergence(*read, hidden, weight, kind="forward_kl", **common)
    uniform = uniform + row_weight.sum() * math.log(len(weight))
    return (1 - label_smoothing) * total + label_smoothing * uniform
