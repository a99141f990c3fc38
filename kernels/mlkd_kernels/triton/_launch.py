"""What surrounds a launch: the device, layouts, and the unit of the upstream gradient."""

import contextlib

import torch
from torch import Tensor

# Kernels compute in base 2; the caller's scales are for exp.
LOG2_E = 1.4426950408889634


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(x.device).device(x.device)


def rowwise(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gradient_like(x: Tensor) -> Tensor:
    """Unwritten, laid out like `x` where that is dense."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def row_gradient(
    grad: Tensor,  # [B, H, L]
    keep: Tensor | None,  # [B, L] bool
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The upstream gradient of rows and the unit it is in, None where that is 1.

    A kernel rounds grad / unit * (Q - P) to the student's type before it multiplies by the
    student's rows. In fp16 it would vanish, since the upstream gradient carries 1 / (number of
    rows): the largest becomes 2^12, which leaves room for the sum of a row's and a column's.
    """
    grad = grad.float().contiguous()
    if dtype != torch.float16:
        return grad, None
    known = grad if keep is None else grad.where(keep[:, None], 0.0)
    unit = known.abs().amax().clamp_min(1e-30) / 4096
    return grad / unit, unit
