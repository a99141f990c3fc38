"""Attention scores before the softmax, head by head."""

from torch import Tensor

from mlkd_dist.losses._maps import map_rows
from mlkd_dist.trace import Layer
from mlkd_kernels import attention_mse as kernel

ROWS = "token"
SCOPE = "layer"
READS = ("query", "key")
TEACHER = True
PROJECTION = False
SAME_HEADS = True


def attention_mse(
    student: Layer,
    teacher: Layer,
    *,
    row_weight: Tensor | None = None,  # [B, L]
    backend: str = "auto",
) -> Tensor:  # [B, H, L], or a scalar
    """Mean over j of (s_ij - t_ij)^2 for every head and token i, t_ij = scale * <q_i, k_j>.

    q and k are the teacher's queries and keys as they enter attention, its scale the model's own;
    s_ij is the student's likewise. The numbers of heads must be the same; key heads may be fewer,
    in either model. j runs over real tokens, in causal models up to i; 0 at padding. Raises
    ValueError where the heads differ or only one model is causal. L_attn of TinyBERT (Jiao et al.
    2020, arXiv 1909.10351). Our reading: the mean over heads and tokens, the sum over layers.
    """
    return map_rows(kernel, student, teacher, row_weight, backend)
