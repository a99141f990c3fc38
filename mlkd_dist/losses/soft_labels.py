"""The teacher's predictions as targets."""

import torch
from torch import Tensor

from mlkd_dist.trace import Trace
from mlkd_kernels.rows import drop_masked, row_kl, widen

ROWS = "label"
SCOPE = "trace"
READS = ("logits",)
TEACHER = True
PROJECTION = False


def soft_labels(
    student: Trace,
    teacher: Trace,
    *,
    temperature: float = 1.0,
    squared_temperature: bool = False,
) -> Tensor:  # [B], [B, L] or [B, 2]
    """KL(P || Q), P = softmax(teacher.logits / T) over the last dimension, T the temperature.

    Q is the student's likewise. Not cross-entropy: 0 where the models agree. `squared_temperature`
    multiplies by T^2; our reading is without. One logit is no distribution but a regression: its
    rows are ((z_student - z_teacher) / T)^2 (our reading). Logits per token are 0 at padding.
    Raises ValueError where the logits' shapes differ or T is not above 0. L_KD of MLKD-BERT (Zhang,
    Yang, Ji 2024, arXiv 2407.02775); Hinton, Vinyals, Dean 2015 (arXiv 1503.02531).
    """
    assert student.logits is not None and teacher.logits is not None
    shape, teacher_shape = tuple(student.logits.shape), tuple(teacher.logits.shape)
    if shape != teacher_shape:
        raise ValueError(
            f"soft_labels: the student's logits are {shape} and the teacher's {teacher_shape}; "
            "both models need the same classes or vocabulary."
        )
    if not temperature > 0:
        raise ValueError(f"soft_labels: temperature={temperature}; it must be greater than 0.")
    logits = [widen(student.logits), widen(teacher.logits.detach())]
    # One row per token; spans have two rows, and rule padding out themselves.
    if shape[:-1] == tuple(student.mask.shape):
        logits = [drop_masked(z, student.mask) for z in logits]
    student_scores, teacher_scores = (z / temperature for z in logits)
    if shape[-1] == 1:
        rows = torch.square(student_scores - teacher_scores).squeeze(-1)
    else:
        rows = row_kl(teacher_scores, student_scores)
    return rows * temperature**2 if squared_temperature else rows
