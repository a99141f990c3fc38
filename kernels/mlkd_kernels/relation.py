"""KL between the token-to-token relations of teacher and student."""

from torch import Tensor

from mlkd_kernels._backend import choose
from mlkd_kernels.rows import check_positive, drop_masked, gram, keep_or_all, row_kl, token_pairs


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
    backend: str = "auto",
) -> Tensor:  # [B, R, L]
    """KL(P_i || Q_i) for every relation head and token i.

    P_i = softmax_j(teacher_scale * <t_i, t_j> / temperature), Q_i likewise of the student, on the
    `heads` equal blocks of the width; the scale defaults to 1/sqrt(width of a block). No T^2
    inside. A masked token is neither row nor key and its row is 0; with `causal` j runs to i.
    Raises ValueError where a width is not divisible by `heads`, or batches or lengths differ. Wang
    et al. 2021 (arXiv 2012.15828); Zhang, Yang, Ji 2024 (arXiv 2407.02775).
    """
    choose(backend)
    check_positive("temperature", temperature)
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student is {tuple(student.shape)} and teacher {tuple(teacher.shape)}; batch and "
            "length must be the same."
        )
    keep = keep_or_all(mask, student, 2)
    scores = [
        _scores(drop_masked(x, keep), name, heads, scale, temperature)
        for name, x, scale in (
            ("student", student, student_scale),
            ("teacher", teacher.detach(), teacher_scale),
        )
    ]
    return row_kl(scores[1], scores[0], token_pairs(keep, causal))


def _scores(
    x: Tensor, name: str, heads: int, scale: float | None, temperature: float
) -> Tensor:  # [B, L, R*d] -> [B, R, L, L]
    width = x.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(
            f"the {name}'s width {width} is not divisible by heads={heads}; choose a divisor of "
            "both widths."
        )
    x = x.unflatten(-1, (heads, width // heads)).transpose(1, 2)
    scale = (width // heads) ** -0.5 if scale is None else scale
    return gram(x, x, scale / temperature)
