"""KL between the token-to-token relations of teacher and student."""

from typing import Any

from torch import Tensor

from mlkd_kernels._backend import choose, head_lacks, type_lacks
from mlkd_kernels._dispatch import Operation, summed, weighing
from mlkd_kernels.rows import (
    check_positive,
    check_row_weight,
    drop_masked,
    gram,
    keep_or_all,
    row_kl,
    token_pairs,
    weighted_sum,
    wide_type,
)
from mlkd_kernels.streamed import relation as streamed
from mlkd_kernels.streamed.blocks import is_small

# Of both vectors of a head together; measured on a CPU, where 96 gains and 1152 loses.
WIDE = 512


def relation_kl(
    student: Tensor,  # [B, L, R*ds]
    teacher: Tensor,  # [B, L, R*dt]
    *,
    heads: int,
    mask: Tensor | None = None,  # [B, L] bool, True where a token is real
    causal: bool = False,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    temperature: float = 1.0,
    row_weight: Tensor | None = None,  # [B, L]
    backend: str = "auto",
) -> Tensor:  # [B, R, L], or a scalar
    """KL(P_i || Q_i) for every relation head and token i.

    P_i = softmax_j(teacher_scale * <t_i, t_j> / temperature), Q_i likewise of the student, on the
    `heads` equal blocks of the width; the scale defaults to 1/sqrt(width of a block). No T^2
    inside. A masked token is neither row nor key and its row is 0; with `causal` j runs to i. With
    `row_weight` the sum over heads and tokens of weight times KL, the same number for less: its
    gradient, of the student alone, is made in the forward pass. Raises ValueError where a width is
    not divisible by `heads`, or batches, lengths or weights differ. Wang et al. 2021 (arXiv
    2012.15828); Zhang, Yang, Ji 2024 (arXiv 2407.02775).
    """
    check_positive("temperature", temperature)
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student is {tuple(student.shape)} and teacher {tuple(teacher.shape)}; batch and "
            "length must be the same."
        )
    keep = None if mask is None else keep_or_all(mask, student, 2)
    check_row_weight(row_weight, student.shape[:2])
    options = {
        "heads": heads,
        "causal": causal,
        "student_scale": _scale("student", student, heads, student_scale) / temperature,
        "teacher_scale": _scale("teacher", teacher, heads, teacher_scale) / temperature,
    }
    backend = choose(backend, student, triton_lacks=type_lacks(student.dtype, teacher.dtype))
    if row_weight is not None:
        return SUM(backend, student, teacher, keep, row_weight.detach(), **options)
    if backend == "streamed" and _keeping_is_cheaper(student, teacher, heads):
        backend = "eager"
    return ROWS(backend, student, teacher, keep, **options)


def eager(
    student: Tensor,  # [B, L, R*ds]
    teacher: Tensor,  # [B, L, R*dt]
    keep: Tensor | None,  # [B, L] bool
    *,
    heads: int,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:  # [B, R, L]
    keep = keep_or_all(keep, student, 2)
    student_scores = _scores(drop_masked(student, keep), heads, student_scale)
    teacher_scores = _scores(drop_masked(teacher.detach(), keep), heads, teacher_scale)
    return row_kl(teacher_scores, student_scores, token_pairs(keep, causal))


def _scores(x: Tensor, heads: int, scale: float) -> Tensor:  # [B, L, R*d] -> [B, R, L, L]
    x = x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)
    return gram(x, x, scale)


def _scale(name: str, x: Tensor, heads: int, scale: float | None) -> float:
    width = x.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(
            f"the {name}'s width {width} is not divisible by heads={heads}; choose a divisor of "
            "both widths."
        )
    return (width // heads) ** -0.5 if scale is None else scale


def _keeping_is_cheaper(student: Tensor, teacher: Tensor, heads: int) -> bool:
    """Whether the scores are few and made of long vectors: dear to make a second time."""
    batch, length = student.shape[:2]
    few = is_small(batch * heads * length, length)
    return few and student.shape[2] + teacher.shape[2] >= WIDE * heads


def _triton(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    *,
    heads: int,
    row_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    # Imported here since triton need not be installed.
    from mlkd_kernels.triton.relation import relation_kl as kernel
    from mlkd_kernels.triton.row_kl import FUSED

    widths = (x.shape[-1] // heads for x in (student, teacher))
    if head_lacks(*widths) is None:
        return weighted_sum(kernel(student, teacher, keep, heads=heads, **options), row_weight)
    options |= {"heads": heads, "row_weight": row_weight, "ops": FUSED}
    return streamed.relation_kl(student, teacher, keep, **options)


def _like(student: Tensor, teacher: Tensor, keep: Tensor | None, *, heads: int, **_: Any) -> Tensor:
    batch, length = student.shape[:2]
    return student.new_empty(batch, heads, length, dtype=wide_type(student, teacher))


OPTIONS = "int heads, bool causal, float student_scale, float teacher_scale"
ROWS = Operation(
    "relation_kl",
    {"eager": eager, "streamed": streamed.relation_kl, "triton": _triton},
    f"Tensor student, Tensor teacher, Tensor? keep, {OPTIONS}",
    leaves=1,
    like=_like,
)
SUM = Operation(
    "relation_kl_sum",
    {
        "eager": summed(eager),
        "streamed": weighing(streamed.relation_kl),
        "triton": weighing(_triton),
    },
    f"Tensor student, Tensor teacher, Tensor? keep, Tensor row_weight, {OPTIONS}",
    leaves=1,
    like=lambda *tensors, **_: tensors[0].new_empty((), dtype=wide_type(*tensors[:2])),
    scalar=True,
)
