"""Token similarities of the embeddings."""

from torch import Tensor

from mlkd_dist.trace import Trace
from mlkd_kernels import relation_kl

ROWS = "token"
SCOPE = "trace"
READS = ("embedding",)
TEACHER = True
PROJECTION = False


def embedding_relation(
    student: Trace,
    teacher: Trace,
    *,
    temperature: float = 1.0,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    row_weight: Tensor | None = None,  # [B, L]
    backend: str = "auto",
) -> Tensor:  # [B, L], or a scalar
    """KL(P_i || Q_i) for every token i, P_i = softmax_j(teacher_scale * <e_i, e_j> / T).

    e are the teacher's embeddings, Q_i is the student's likewise, T the temperature; no T^2 inside.
    Widths may differ; the scale defaults to 1/sqrt(width). j runs over real tokens; 0 at padding.
    L_EMB of MLKD-BERT (Zhang, Yang, Ji 2024, arXiv 2407.02775). Our reading: e is what enters the
    first layer, after the embeddings' own norm; padding is no key.
    """
    assert student.embedding is not None and teacher.embedding is not None
    rows = relation_kl(
        student.embedding,
        teacher.embedding,
        heads=1,
        mask=student.mask,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        temperature=temperature,
        row_weight=row_weight,
        backend=backend,
    )
    return rows.squeeze(1) if row_weight is None else rows
