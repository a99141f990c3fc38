"""Token similarities of what attention makes, in splits that need not be heads."""

from torch import Tensor

from mlkd_dist.trace import Layer
from mlkd_kernels import relation_kl

ROWS = "token"
SCOPE = "layer"
READS = ("query", "key", "value", "context", "attention_output")
TEACHER = True
PROJECTION = False


def attention_relation(
    student: Layer,
    teacher: Layer,
    *,
    of: list[str] = ("context",),
    splits: int | None = None,
    temperature: float = 1.0,
    causal: bool | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    row_weight: Tensor | None = None,  # [B, L]
    backend: str = "auto",
) -> Tensor:  # [B, R, L], or a scalar
    """KL(P_i || Q_i) for every split and token i, summed over the vectors that `of` names.

    P_i = softmax_j(teacher_scale * <o_i, o_j> / T), o the split's block of the teacher's vectors,
    Q_i the student's likewise, T the temperature; no T^2 inside. The widths are cut into `splits`
    equal blocks, by default as many as the student has heads; heads and widths of the models may
    differ. The scale defaults to 1/sqrt(width of a block). j runs over real tokens, with `causal`
    up to i, by default as the student's own attention does; 0 at padding. Raises ValueError where a
    width is not divisible by the splits, or `of` names nothing or something unknown.
    L_MHA of MLKD-BERT (Zhang, Yang, Ji 2024, arXiv 2407.02775). Our reading: of `context`, the
    heads' results side by side before the output projection; `attention_output` is after it; query,
    key and value are the relations of MiniLMv2 (Wang et al. 2021, arXiv 2012.15828).
    """
    unknown = [name for name in of if name not in READS]
    if unknown or not of:
        raise ValueError(
            f"of={list(of)}; it must name at least one of {', '.join(READS)} and nothing else."
        )
    splits = student.heads if splits is None else splits
    rows = []
    for name in of:
        seen_by_student, seen_by_teacher = getattr(student, name), getattr(teacher, name)
        assert seen_by_student is not None and seen_by_teacher is not None, name
        _check_splits(name, seen_by_student.shape[-1], seen_by_teacher.shape[-1], splits)
        rows.append(
            relation_kl(
                seen_by_student,
                seen_by_teacher,
                heads=splits,
                mask=student.mask,
                causal=student.causal if causal is None else causal,
                student_scale=student_scale,
                teacher_scale=teacher_scale,
                temperature=temperature,
                row_weight=None if row_weight is None else row_weight / splits,
                backend=backend,
            )
        )
    return sum(rows[1:], rows[0])


def _check_splits(name: str, student_width: int, teacher_width: int, splits: int) -> None:
    if splits < 1 or student_width % splits or teacher_width % splits:
        raise ValueError(
            f"attention_relation of {name}: the student's width {student_width} and the teacher's "
            f"{teacher_width} must both be divisible by splits={splits}; set splits to a common "
            "divisor."
        )
