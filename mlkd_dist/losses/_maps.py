"""What losses on attention maps share."""

from collections.abc import Callable

from torch import Tensor

from mlkd_dist.trace import Layer


def map_rows(
    kernel: Callable[..., Tensor],
    student: Layer,
    teacher: Layer,
    row_weight: Tensor | None,  # [B, L]
    backend: str,
) -> Tensor:  # [B, H, L], or a scalar
    """`kernel` of the attention maps of two layers, with each model's own scale. Raises ValueError
    where only one of them is causal: their rows run over different keys."""
    if student.causal != teacher.causal:
        raise ValueError(
            "attention maps of a causal and of a bidirectional model cannot be compared; use two "
            "models of one kind, or attention_relation, which makes its own maps."
        )
    return kernel(
        student.by_head("query"),
        student.by_head("key"),
        teacher.by_head("query"),
        teacher.by_head("key"),
        mask=student.mask,
        causal=student.causal,
        student_scale=student.scale,
        teacher_scale=teacher.scale,
        row_weight=None if row_weight is None else row_weight / student.heads,
        backend=backend,
    )
