"""The teacher's predictions as targets."""

from typing import Literal

import torch
from torch import Tensor

from mlkd_dist.models.head import HeadRows, TopKRows
from mlkd_dist.trace import Trace
from mlkd_kernels import linear_divergence, top_k_divergence
from mlkd_kernels.linear_divergence import MIXTURES, divergence
from mlkd_kernels.rows import drop_masked, widen

ROWS = "label"
SCOPE = "trace"
READS = ("logits",)
TEACHER = True
PROJECTION = False
PACKED = True


def soft_labels(
    student: Trace,
    teacher: Trace,
    *,
    kind: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"
    ] = "forward_kl",
    temperature: float = 1.0,
    beta: float | None = None,
    squared_temperature: bool = False,
    truncate: bool = False,
) -> Tensor:  # [B], [B, L] or [B, 2]
    """The divergence of Q from P, P = softmax(teacher.logits / T) over the last dimension, T the
    temperature; Q is the student's likewise.

    By `kind`: forward_kl KL(P || Q), reverse_kl KL(Q || P), jsd beta KL(P || M) + (1 - beta)
    KL(Q || M) with M = beta P + (1 - beta) Q, skew_forward_kl KL(P || beta P + (1 - beta) Q),
    skew_reverse_kl KL(Q || beta Q + (1 - beta) P), tvd sum |P - Q| / 2. `beta` is 0.5 by default
    for jsd and 0.1 for the skewed kinds. Not cross-entropy: 0 where the models agree.
    `squared_temperature` multiplies by T^2; our reading is without. Where the models' heads have
    different numbers of entries, `truncate` compares the first ones, which both have. One logit is
    no distribution but a regression: its rows are ((z_student - z_teacher) / T)^2 (our reading).
    Logits per token are 0 at padding. Raises ValueError where the logits' shapes differ, T is not
    above 0 or beta is given to a kind without a mixture. L_KD of MLKD-BERT (Zhang, Yang, Ji 2024,
    arXiv 2407.02775); Hinton, Vinyals, Dean 2015 (arXiv 1503.02531); jsd as in Agarwal et al. 2024
    (arXiv 2306.13649), the skewed kinds as in Ko et al. 2024 (arXiv 2402.03898).
    """
    assert student.logits is not None and teacher.logits is not None
    beta = _beta(kind, beta)
    logits = [widen(student.logits), widen(teacher.logits.detach())]
    if truncate:
        shared = min(z.shape[-1] for z in logits)
        logits = [z[..., :shared] for z in logits]
    shape, teacher_shape = (tuple(z.shape) for z in logits)
    if shape != teacher_shape:
        raise ValueError(
            f"soft_labels: the student's logits are {shape} and the teacher's {teacher_shape}; "
            "both models need the same classes or vocabulary."
        )
    if not temperature > 0:
        raise ValueError(f"soft_labels: temperature={temperature}; it must be greater than 0.")
    # One row per token; spans have two rows, and rule padding out themselves.
    if shape[:-1] == tuple(student.mask.shape):
        logits = [drop_masked(z, student.mask) for z in logits]
    student_scores, teacher_scores = (z / temperature for z in logits)
    if shape[-1] == 1:
        rows = torch.square(student_scores - teacher_scores).squeeze(-1)
    else:
        rows = divergence(kind, teacher_scores, student_scores, beta)
    return rows * temperature**2 if squared_temperature else rows


def over_vocabulary(
    student: HeadRows,
    teacher: HeadRows | TopKRows,
    row_weight: Tensor,  # [N]
    labels: Tensor | None,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    beta: float | None = None,
    squared_temperature: bool = False,
    truncate: bool = False,
    backend: str = "auto",
) -> Tensor:  # scalar
    """The weighted sum of the rows of `soft_labels`; the labels say only which rows count. Of a
    teacher's k largest logits, both distributions are over these and one bucket of all others (see
    `top_k_divergence`)."""
    options = {"kind": kind, "temperature": temperature, "beta": _beta(kind, beta)}
    options |= {"row_weight": row_weight, "backend": backend}
    options |= {"student_soft_cap": student.soft_cap, "student_logit_scale": student.scale}
    if isinstance(teacher, TopKRows):
        if truncate:
            student = student.first(teacher.vocabulary)
        if len(student.weight) != teacher.vocabulary:
            raise ValueError(
                f"the student's vocabulary has {len(student.weight)} entries, and the teacher's "
                f"largest logits are of {teacher.vocabulary}; they must be the same."
            )
        kept = teacher.scores(temperature)
        total = top_k_divergence(student.hidden, student.weight, *kept, **options)
        return total * temperature**2 if squared_temperature else total
    if truncate:
        shared = min(len(student.weight), len(teacher.weight))
        student, teacher = student.first(shared), teacher.first(shared)
    total = linear_divergence(
        student.hidden,
        student.weight,
        teacher.hidden,
        teacher.weight,
        teacher_soft_cap=teacher.soft_cap,
        teacher_logit_scale=teacher.scale,
        **options,
    )
    return total * temperature**2 if squared_temperature else total


def _beta(kind: str, beta: float | None) -> float:
    if beta is not None and kind not in MIXTURES:
        raise ValueError(
            f"soft_labels: beta={beta} with kind={kind!r}, which mixes nothing; remove beta, or "
            f"use one of {', '.join(MIXTURES)}."
        )
    return (0.5 if kind == "jsd" else 0.1) if beta is None else beta
