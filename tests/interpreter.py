"""A process in which Triton interprets its kernels, and what compares them with float64."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FP32, FP16 = torch.float32, torch.float16
# Relative to the largest row and to the gradient's norm: the rounding of fp32 scores, and in fp16
# of what is multiplied by the student's rows.
ROWS = {FP32: 1e-5, FP16: 1e-5}
GRADIENT = {FP32: 1e-5, FP16: 1e-3}
# No block owns more than 128 rows or walks over more than 64 keys at a time: 150 tokens are more
# than one of either, and 140 of padding more than two blocks of keys.
LONG, PADDED = 150, 140


def start_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(owner, name, poisoned(getattr(owner, name)))
    from mlkd_kernels._backend import WIDEST_HEAD
    from mlkd_kernels.streamed import blocks, linear_divergence
    from mlkd_kernels.triton import _tiles

    # The interpreter pays for each tile and not for its size; fp16 keeps the shipped ones.
    for table in _tiles.TILES.values():
        table[4] = [(2 * WIDEST_HEAD, _tiles.Tile(64, 64, 4, 1))]
    # Several blocks along a row, and several blocks of rows.
    _tiles.WIDEST_ROW = 32
    blocks.CPU_SCORES, blocks.CPU_ROWS, blocks.MIN_CPU_ROWS = 2**12, 32, 8
    linear_divergence.CPU_TOKENS = 4


def poisoned(function: Callable) -> Callable:
    """What a kernel leaves unwritten must not happen to be 0."""

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    return empty


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    keep = torch.ones(batch, length, dtype=torch.bool)
    if kind == "right":
        keep[0, length // 2 :] = False
    if kind == "left":
        keep[0, : min(PADDED, length - 1)] = False
    if kind == "holes":
        keep[0, length // 4 : length // 2] = False
        keep[-1, ::3] = False
    if kind == "whole":
        keep[0] = False
    return keep


def run(function: Callable, inputs: list[Tensor], weight: Tensor | None = None) -> list[Tensor]:
    """Rows and gradients, each row with an upstream gradient of its own, some negative, one 0."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    rows = function(*leaves)
    if weight is None:
        weight = randn(*rows.shape, seed=9)
        weight[..., :1] = 0.0
    return [rows.detach(), *torch.autograd.grad(rows, leaves, weight.to(rows.dtype))]


def check_parity(
    pair: tuple[Callable, Callable],
    inputs: list[Tensor],
    rows_within: float | None = None,
    gradient_within: float | None = None,
    weight: Tensor | None = None,
) -> None:
    kernel, eager = pair
    dtype = inputs[0].dtype
    rows, *grads = run(kernel, inputs, weight)
    true_rows, *true_grads = run(eager, [x.double() for x in inputs], weight)
    assert rows.dtype == FP32
    error = (rows - true_rows).abs().max() / true_rows.abs().max().clamp_min(1e-30)
    assert error <= (rows_within or ROWS[dtype]), f"rows are off by {error:.1e}"
    for grad, true_grad, x in zip(grads, true_grads, inputs, strict=True):
        assert grad.dtype == dtype and grad.shape == x.shape
        error = (grad - true_grad).norm() / true_grad.norm().clamp_min(1e-30)
        assert error <= (gradient_within or GRADIENT[dtype]), f"gradient is off by {error:.1e}"
