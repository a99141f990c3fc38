"""Similarities among the samples of the global batch."""

from torch import Tensor

from mlkd_dist.trace import Samples
from mlkd_kernels import similarity_kl

ROWS = "sample"
SCOPE = "batch"
READS = ("cls", "mean", "last")
TEACHER = True
PROJECTION = False


def sample_relation(
    student: Samples,
    teacher: Samples,
    *,
    of: str = "cls",
    temperature: float = 1.0,
    normalize: bool = False,
    diagonal: bool = True,
    backend: str = "auto",
) -> Tensor:  # [N]
    """KL(P_i || Q_i) for every sample i, P_i = softmax_j(<c_i, c_j> / (sqrt(width) * T)).

    c are the teacher's vectors, Q_i is the student's likewise, T the temperature; no T^2 inside.
    Widths may differ. With `normalize` the score is the cosine / T; `diagonal=False` leaves out
    j = i. 0 where a sample does not count. L_SS of MLKD-BERT (Zhang, Yang, Ji 2024, arXiv
    2407.02775). Our reading: the scaled inner product, diagonal kept, of="cls": the last layer's
    first token before any pooler. The caller has taken the vector that `of` names.
    """
    assert of in READS, of
    return similarity_kl(
        student.vector,
        teacher.vector,
        temperature=temperature,
        normalize=normalize,
        mask=student.keep,
        diagonal=diagonal,
        backend=backend,
    )
