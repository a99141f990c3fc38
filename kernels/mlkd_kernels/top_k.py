"""The divergence of an output head from what a teacher once said of its likeliest entries."""

import torch
from torch import Tensor

from mlkd_kernels._backend import choose
from mlkd_kernels._dispatch import Operation
from mlkd_kernels.linear_divergence import (
    KINDS,
    check_beta,
    check_head,
    check_rows,
    divergence,
    logits_of,
)
from mlkd_kernels.rows import check_positive, drop_masked, keep_or_all, wide_type, widen
from mlkd_kernels.streamed import top_k as streamed
from mlkd_kernels.streamed.linear_divergence import Head

# Those of two distributions.
DISTRIBUTIONS = tuple(kind for kind in KINDS if kind != "cross_entropy")


def top_k_divergence(
    student_hidden: Tensor,  # [N, D]
    student_weight: Tensor,  # [V, D]
    teacher_scores: Tensor,  # [N, k]
    teacher_ids: Tensor,  # [N, k] int64, all different in a row
    teacher_rest: Tensor | None,  # [N], None where k = V
    *,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    row_weight: Tensor | None = None,  # [N]
    student_soft_cap: float | None = None,
    student_logit_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # scalar
    """Sum over rows of row_weight times the divergence of P (teacher) and Q (student) over k + 1
    buckets: the k entries of the vocabulary that teacher_ids names, and all others as one.

    P = softmax of [teacher_scores, teacher_rest]: the teacher's logits / T of these entries, and
    log sum_v exp(logit_v / T) over the others, both up to one constant per row. With z the
    student's logits, as in `linear_divergence`, and T the temperature,
        Q_b = softmax(z / T) at entry b,   Q_rest = 1 - sum_b Q_b = sum of softmax(z / T) elsewhere
    Kinds and beta are those of `linear_divergence` without cross_entropy; no T^2 inside. At k = V
    it is that divergence of the whole distributions; below, it is never more (data processing:
    each kind is an f-divergence, and buckets are a function of entries). The gradient spreads what
    falls on the last bucket over the other entries as the student does. It goes to student_hidden
    and student_weight; a row of weight 0 is never read. Raises ValueError for an unknown kind, beta
    outside (0, 1) for a mixture, shapes that do not go together, more ids than entries, and rest
    missing or given to k = V. Our reading: the tail is one bucket, not left out and scaled away.
    """
    check_positive("temperature", temperature)
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"kind={kind!r}; it must be one of {', '.join(DISTRIBUTIONS)}.")
    check_beta(kind, beta)
    check_head("student", student_logit_scale, student_soft_cap)
    check_rows(
        len(student_hidden),
        row_weight=row_weight,
        teacher_scores=teacher_scores,
        teacher_rest=teacher_rest,
    )
    _check_entries(teacher_scores, teacher_ids, teacher_rest, len(student_weight))
    return OPERATION(
        choose(backend, student_hidden, triton_lacks="top_k_divergence has no Triton kernel"),
        student_hidden,
        student_weight,
        teacher_scores.detach(),
        teacher_ids,
        None if teacher_rest is None else teacher_rest.detach(),
        None if row_weight is None else row_weight != 0,
        None if row_weight is None else row_weight.detach(),
        kind=kind,
        beta=beta,
        temperature=temperature,
        student_scale=student_logit_scale,
        student_cap=student_soft_cap,
    )


def _check_entries(scores: Tensor, ids: Tensor, rest: Tensor | None, vocabulary: int) -> None:
    if scores.shape != ids.shape or scores.ndim != 2:
        raise ValueError(
            f"teacher_scores are {tuple(scores.shape)} and teacher_ids {tuple(ids.shape)}; both "
            f"must be [N, k]."
        )
    count = scores.shape[1]
    if count > vocabulary:
        raise ValueError(
            f"{count} entries are given of each row, and the student's vocabulary has {vocabulary}."
        )
    if (rest is None) != (count == vocabulary):
        raise ValueError(
            f"teacher_rest is {'missing' if rest is None else 'given'} with {count} of "
            f"{vocabulary} entries; it stands for the others, where there are any."
        )


def _eager(
    student_hidden: Tensor,  # [N, D]
    student_weight: Tensor,  # [V, D]
    teacher_scores: Tensor,  # [N, k]
    teacher_ids: Tensor,  # [N, k]
    teacher_rest: Tensor | None,  # [N]
    keep: Tensor | None,  # [N] bool, None where all rows count
    row_weight: Tensor | None,  # [N]
    *,
    kind: str,
    beta: float,
    temperature: float,
    student_scale: float,
    student_cap: float | None,
) -> Tensor:  # scalar
    keep = keep_or_all(keep, student_hidden, 1)
    head = Head(student_scale, student_cap, temperature)
    logits = logits_of(drop_masked(student_hidden, keep), student_weight, head)
    teacher, student = drop_masked(teacher_scores, keep), logits.gather(1, teacher_ids)
    if teacher_rest is not None:
        others = logits.scatter(1, teacher_ids, float("-inf")).logsumexp(-1, keepdim=True)
        rest = torch.where(keep, widen(teacher_rest), 0.0).unsqueeze(1)
        teacher, student = torch.cat([teacher, rest], 1), torch.cat([student, others], 1)
    rows = divergence(kind, teacher.to(logits.dtype), student, beta)
    weight = torch.ones_like(rows) if row_weight is None else row_weight
    return (rows * weight.to(rows.dtype)).sum()


OPERATION = Operation(
    "top_k_divergence",
    {"eager": _eager, "streamed": streamed.top_k_divergence},
    "Tensor student_hidden, Tensor student_weight, Tensor teacher_scores, Tensor teacher_ids, "
    "Tensor? teacher_rest, Tensor? keep, Tensor? row_weight, str kind, float beta, "
    "float temperature, float student_scale, float? student_cap",
    leaves=2,
    like=lambda *tensors, **_: tensors[0].new_empty((), dtype=wide_type(*tensors[:2])),
    scalar=True,
)
