"""Attention maps, head by head."""

from torch import Tensor

from mlkd_dist.losses._maps import map_rows
from mlkd_dist.trace import Layer
from mlkd_kernels import attention_kl as kernel

ROWS = "token"
SCOPE = "layer"
READS = ("query", "key")
TEACHER = True
PROJECTION = False
SAME_HEADS = True


def attention_kl(
    student: Layer,
    teacher: Layer,
    *,
    row_weight: Tensor | None = None,  # [B, L]
    backend: str = "auto",
) -> Tensor:  # [B, H, L], or a scalar
    """KL(P_i || Q_i) for every head and token i, P_i = softmax_j(scale * <q_i, k_j>).

    q and k are the teacher's queries and keys as they enter attention, its scale the model's own;
    Q_i is the student's likewise. No temperature. Head h meets head h, so the numbers of heads must
    be the same; key heads may be fewer, in either model. j runs over real tokens, in causal models
    up to i; 0 at padding. Raises ValueError where the heads differ or only one model is causal.
    Aguilar et al. 2020 (arXiv 1910.03723). Our reading: the mean over heads and tokens, the sum
    over layers.
    """
    return map_rows(kernel, student, teacher, row_weight, backend)
