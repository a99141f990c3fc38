"""Products of matrices whose sums are never rounded to 16 bits."""

import torch
from torch import Tensor

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def factors(left: Tensor, right: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both as they enter a product: widened where the device cannot sum 16 bit products in fp32,
    or where they differ."""
    if left.dtype == right.dtype and wide == torch.float32 and multiplies_16_bits(left):
        return left, right
    return left.to(wide), right.to(wide)


def multiplies_16_bits(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in SIXTEEN_BITS


def put_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """out = scale left right; matrices or batches of them."""
    _product(out, left, right, scale, 0.0)


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """out += scale left right"""
    _product(out, left, right, scale, 1.0)


def _product(out: Tensor, left: Tensor, right: Tensor, scale: float, keep: float) -> None:
    multiply = torch.addmm if out.ndim == 2 else torch.baddbmm
    as_out = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    multiply(out, left, right, **as_out, beta=keep, alpha=scale, out=out)
