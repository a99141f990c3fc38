"""What rows share: their precision, their masks, and the KL of two rows of scores."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """fp32, or float64 where it came so."""
    return x if x.dtype == torch.float64 else x.float()


def wide_type(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or float64 where one of them is."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def gram(
    left: Tensor, right: Tensor, scale: float
) -> Tensor:  # [..., M, D], [..., N, D] -> [..., M, N]
    with full_precision(left):
        return widen(left) @ widen(right).mT * scale


@contextlib.contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Neither autocast nor tf32: the difference of two such scores would be too coarse."""
    matmul = torch.backends.cuda.matmul
    # A compiler has its own way with the second setting, and breaks its graph at this one.
    changed = like.is_cuda and not torch.compiler.is_compiling() and matmul.fp32_precision != "ieee"
    before = matmul.fp32_precision if changed else ""
    with torch.autocast(like.device.type, enabled=False):
        if changed:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if changed:
                matmul.fp32_precision = before


def keep_or_all(mask: Tensor | None, like: Tensor, dims: int) -> Tensor:
    """`mask`, checked against the first `dims` sizes of `like`; all True where there is none."""
    shape = like.shape[:dims]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool of shape "
            f"{tuple(shape)}, True where it counts (for a Hugging Face attention mask: "
            "attention_mask.bool())."
        )
    return mask


def drop_masked(x: Tensor, keep: Tensor) -> Tensor:  # [..., D], [...] -> [..., D]
    """Zero where not kept, and wide: not even NaN in padding reaches a value or a gradient."""
    return zero_masked(widen(x), keep)


def zero_masked(x: Tensor, keep: Tensor) -> Tensor:  # [..., D], [...] -> [..., D]
    return torch.where(keep.unsqueeze(-1), x, 0.0)


def check_row_weight(row_weight: Tensor | None, shape: torch.Size) -> None:
    if row_weight is not None and row_weight.shape != shape:
        raise ValueError(
            f"row_weight is of shape {tuple(row_weight.shape)}; it must be {tuple(shape)}, one "
            "number per token."
        )


def weighted_sum(rows: Tensor, row_weight: Tensor | None) -> Tensor:  # [B, R, L], [B, L] -> scalar
    """The rows as they are where there are no weights. A row without weight cannot matter."""
    if row_weight is None:
        return rows
    weight = row_weight.unsqueeze(1)
    return (torch.where(weight != 0, rows, 0.0) * weight).sum()


def token_pairs(keep: Tensor, causal: bool) -> Tensor:  # [B, L] -> [B, 1, L, L]
    """True where row i may look at key j: both are real and, where causal, j <= i."""
    allowed = keep[:, None, :, None] & keep[:, None, None, :]
    return allowed.tril() if causal else allowed


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value}; it must be greater than 0.")


def row_kl(
    p_scores: Tensor, q_scores: Tensor, allowed: Tensor | None = None
) -> Tensor:  # [..., N] twice -> [...]
    """KL(P || Q), P = softmax(p_scores), Q = softmax(q_scores) over the allowed entries.

    0 where none is allowed. With a = exp(p - max p) and b = exp(q - max q) of the scores p and q:
        KL = sum_j a_j ((p_j - max p) - (q_j - max q)) / sum a + log(sum b / sum a)
    Its value and its gradient Q - P are exactly 0 where the scores are the same, which differences
    of log-softmax do not reach, and the logarithm is of a number near 1 where they are alike: two
    lse would each be rounded at their own size.
    """
    if allowed is not None:
        p_scores = p_scores.masked_fill(~allowed, torch.finfo(p_scores.dtype).min)
        q_scores = q_scores.masked_fill(~allowed, torch.finfo(q_scores.dtype).min)
    p_scores = p_scores - p_scores.detach().amax(-1, keepdim=True)
    q_scores = q_scores - q_scores.detach().amax(-1, keepdim=True)
    p_power = p_scores.exp()
    p_sum, q_sum = p_power.sum(-1), q_scores.exp().sum(-1)
    # Where P is 0 the gap may be inf - inf.
    gap = torch.where(p_power > 0, p_scores - q_scores, 0.0)
    return (p_power * gap).sum(-1) / p_sum + (q_sum / p_sum).log()
