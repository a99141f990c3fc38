"""Squared difference of embeddings."""

from collections.abc import Callable

from torch import Tensor

from mlkd_dist.losses._states import state_mse
from mlkd_dist.trace import Trace

ROWS = "token"
SCOPE = "trace"
READS = ("embedding",)
TEACHER = True
PROJECTION = True
PACKED = True


def embedding_mse(
    student: Trace, teacher: Trace, projection: Callable[[Tensor], Tensor]
) -> Tensor:  # [B, L]
    """Mean over the teacher's width of (projection(e) - t)^2, e and t what enters the first layers.

    e is the student's, t the teacher's; 0 at padding. Raises ValueError where the projected width
    is not the teacher's. L_embd of TinyBERT (Jiao et al. 2020, arXiv 1909.10351). Our reading: a
    projection of its own, apart from that of the hidden states.
    """
    assert student.embedding is not None and teacher.embedding is not None
    ours, theirs = student.embedding, teacher.embedding
    return state_mse("embedding_mse", ours, theirs, student.mask, projection)
