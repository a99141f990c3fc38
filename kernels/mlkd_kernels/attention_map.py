"""How the attention maps of teacher and student differ, head by head."""

from typing import Any

import torch
from torch import Tensor

from mlkd_kernels._backend import choose, head_lacks
from mlkd_kernels._dispatch import Operation, summed, weighing
from mlkd_kernels.rows import (
    check_row_weight,
    drop_masked,
    gram,
    keep_or_all,
    row_kl,
    token_pairs,
    wide_type,
)
from mlkd_kernels.streamed import attention_map as streamed


def attention_kl(
    student_query: Tensor,  # [B, H, L, ds]
    student_key: Tensor,  # [B, Hkv, L, ds]
    teacher_query: Tensor,  # [B, H, L, dt]
    teacher_key: Tensor,  # [B, Hkv', L, dt]
    *,
    mask: Tensor | None = None,  # [B, L] bool, True where a token is real
    causal: bool = False,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    row_weight: Tensor | None = None,  # [B, L]
    backend: str = "auto",
) -> Tensor:  # [B, H, L], or a scalar
    """KL(P_i || Q_i) of the attention rows P_i = softmax_j(teacher_scale * <q_i, k_j>).

    Q_i is the student's likewise; the scale defaults to 1/sqrt(d). With fewer key heads than query
    heads, query head h reads key head h // (H / Hkv). No temperature. A masked token is neither row
    nor key and its row is 0; with `causal` j runs to i. With `row_weight` the sum over heads and
    tokens of weight times KL, the same number for less: its gradient, of the student alone, is made
    in the forward pass. Raises ValueError where the models' query heads, batches or lengths differ,
    weights have another shape, or key heads do not divide query heads. Aguilar et al. 2020 (arXiv
    1910.03723).
    """
    vectors = student_query, student_key, teacher_query, teacher_key
    keep, scales = _checked(vectors, mask, student_scale, teacher_scale, row_weight)
    queries = student_query, teacher_query
    lacks = head_lacks(*(x.shape[-1] for x in queries), *(x.dtype for x in queries))
    backend = choose(backend, student_query, triton_lacks=lacks)
    if row_weight is not None:
        return KL_SUM(backend, *vectors, keep, row_weight.detach(), causal=causal, **scales)
    return KL(backend, *vectors, keep, causal=causal, **scales)


def attention_mse(
    student_query: Tensor,  # [B, H, L, ds]
    student_key: Tensor,  # [B, Hkv, L, ds]
    teacher_query: Tensor,  # [B, H, L, dt]
    teacher_key: Tensor,  # [B, Hkv', L, dt]
    *,
    mask: Tensor | None = None,  # [B, L] bool, True where a token is real
    causal: bool = False,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    row_weight: Tensor | None = None,  # [B, L]
    backend: str = "auto",
) -> Tensor:  # [B, H, L], or a scalar
    """Mean over j of (s_ij - t_ij)^2, the scores before the softmax: t_ij = scale <q_i, k_j>.

    s_ij is the student's likewise. Key heads, scales, mask, `causal` and `row_weight` are as in
    attention_kl, and so is what raises. Jiao et al. 2020 (arXiv 1909.10351), L_attn; our reading:
    scaled scores, and the mean is over the keys that a row may look at.
    """
    vectors = student_query, student_key, teacher_query, teacher_key
    keep, scales = _checked(vectors, mask, student_scale, teacher_scale, row_weight)
    backend = choose(backend, student_query, triton_lacks="attention_mse has no Triton kernel")
    if row_weight is not None:
        return MSE_SUM(backend, *vectors, keep, row_weight.detach(), causal=causal, **scales)
    return MSE(backend, *vectors, keep, causal=causal, **scales)


def eager(
    student_query: Tensor,  # [B, H, L, ds]
    student_key: Tensor,  # [B, Hkv, L, ds]
    teacher_query: Tensor,  # [B, H, L, dt]
    teacher_key: Tensor,  # [B, Hkv', L, dt]
    keep: Tensor | None,  # [B, L] bool
    *,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:  # [B, H, L]
    keep = keep_or_all(keep, student_query.transpose(1, 2), 2)
    student = _scores(student_query, student_key, keep, student_scale)
    teacher = _scores(teacher_query.detach(), teacher_key.detach(), keep, teacher_scale)
    return row_kl(teacher, student, token_pairs(keep, causal))


def eager_mse(
    student_query: Tensor,  # [B, H, L, ds]
    student_key: Tensor,  # [B, Hkv, L, ds]
    teacher_query: Tensor,  # [B, H, L, dt]
    teacher_key: Tensor,  # [B, Hkv', L, dt]
    keep: Tensor | None,  # [B, L] bool
    *,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
) -> Tensor:  # [B, H, L]
    keep = keep_or_all(keep, student_query.transpose(1, 2), 2)
    student = _scores(student_query, student_key, keep, student_scale)
    teacher = _scores(teacher_query.detach(), teacher_key.detach(), keep, teacher_scale)
    allowed = token_pairs(keep, causal)
    gap = torch.where(allowed, student - teacher, 0.0)
    return gap.square().sum(-1) / allowed.sum(-1).clamp_min(1)


def _scores(
    query: Tensor, key: Tensor, keep: Tensor, scale: float
) -> Tensor:  # [B, H, L, d], [B, Hkv, L, d] -> [B, H, L, L]
    query, key = (drop_masked(x, keep[:, None]) for x in (query, key))
    return gram(query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1), scale)


def _checked(
    vectors: tuple[Tensor, ...],
    mask: Tensor | None,
    student_scale: float | None,
    teacher_scale: float | None,
    row_weight: Tensor | None,
) -> tuple[Tensor | None, dict[str, float]]:
    """The mask and the scales; ValueError where heads, batches, lengths or key heads do not go
    together."""
    student_query, student_key, teacher_query, teacher_key = vectors
    shapes = [student_query.shape, teacher_query.shape]
    if shapes[0][:3] != shapes[1][:3]:
        raise ValueError(
            f"the student's queries are {tuple(shapes[0])} and the teacher's {tuple(shapes[1])}; "
            "batch, heads and length must be the same. Where the heads differ use relation_kl, "
            "which cuts both widths anew."
        )
    keep = None if mask is None else keep_or_all(mask, student_query.transpose(1, 2), 2)
    check_row_weight(row_weight, student_query.transpose(1, 2).shape[:2])
    return keep, {
        "student_scale": _scale("student", student_query, student_key, student_scale),
        "teacher_scale": _scale("teacher", teacher_query, teacher_key, teacher_scale),
    }


def _scale(name: str, query: Tensor, key: Tensor, scale: float | None) -> float:
    heads, key_heads = query.shape[1], key.shape[1]
    same = query.shape[0] == key.shape[0] and query.shape[2:] == key.shape[2:]
    if key_heads < 1 or heads % key_heads or not same:
        raise ValueError(
            f"the {name}'s queries are {tuple(query.shape)} and keys {tuple(key.shape)}; the key "
            "heads must divide the query heads; batch, length and width must be the same."
        )
    return query.shape[-1] ** -0.5 if scale is None else scale


def _triton(*tensors: Tensor | None, **options: Any) -> Tensor:
    # Imported here since triton need not be installed.
    from mlkd_kernels.triton.attention_map import attention_kl as kernel

    return kernel(*tensors, **options)


def _like(student_query: Tensor, *others: Tensor | None, **_: Any) -> Tensor:
    vectors = student_query, *others[:3]
    return student_query.new_empty(student_query.shape[:3], dtype=wide_type(*vectors))


def _like_sum(*tensors: Tensor | None, **_: Any) -> Tensor:
    return tensors[0].new_empty((), dtype=wide_type(*tensors[:4]))


SCHEMA = (
    "Tensor student_query, Tensor student_key, Tensor teacher_query, Tensor teacher_key, "
    "Tensor? keep, bool causal, float student_scale, float teacher_scale"
)
KL = Operation(
    "attention_kl",
    {"eager": eager, "streamed": streamed.attention_kl, "triton": _triton},
    SCHEMA,
    leaves=2,
    like=_like,
)
MSE = Operation(
    "attention_mse",
    {"eager": eager_mse, "streamed": streamed.attention_mse},
    SCHEMA,
    leaves=2,
    like=_like,
)
SUM_SCHEMA = SCHEMA.replace("Tensor? keep", "Tensor? keep, Tensor row_weight")
KL_SUM = Operation(
    "attention_kl_sum",
    {
        "eager": summed(eager),
        "streamed": weighing(streamed.attention_kl),
        "triton": summed(_triton),
    },
    SUM_SCHEMA,
    leaves=2,
    like=_like_sum,
    scalar=True,
)
MSE_SUM = Operation(
    "attention_mse_sum",
    {"eager": summed(eager_mse), "streamed": weighing(streamed.attention_mse)},
    SUM_SCHEMA,
    leaves=2,
    like=_like_sum,
    scalar=True,
)
