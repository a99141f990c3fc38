"""What is measured: an operation, the ways to compute it, and the check that a way does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import roofs
import torch
from baselines import autocast, compiled
from shapes import SHAPES, Shape, affordable, described
from torch import Tensor

import mlkd_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest relative error of the value and of the gradients. In 16 bit the gradient itself is
# rounded, and what multiplies the student's rows.
BOUNDS = {"fp32": (1e-4, 1e-4), "bf16": (1e-3, 1e-2), "fp16": (1e-3, 2e-3)}
# What others compute is measured as it is, its error beside it: scores rounded to 16 bit leave few
# digits of the difference of two probabilities.
COARSE, FAIR = (0.5, 0.5), (1e-3, 1e-3)

Bounds = tuple[float, float]
Given = tuple[list[Tensor], list[Tensor]]  # the student's, which get gradients, and the others


class Wrong(Exception):
    """A way does not compute the operation; with the errors that it makes."""


class Way(NamedTuple):
    function: Callable[..., Tensor]  # of the inputs; gives a scalar or rows
    bounds: Bounds | None = None  # of its errors; None for those of what this package promises
    compiles: bool = False


@dataclass(frozen=True)
class Operation:
    name: str
    # (shape, draws normal numbers) -> inputs
    inputs: Callable[[Shape, Callable[..., Tensor]], Given]
    # (shape, backend) -> the operation of mlkd_kernels; "eager" is the definition
    ours: Callable[[Shape, str], Callable[..., Tensor]]
    # shape -> the same in plain PyTorch, in the precision that surrounds it
    plain: Callable[[Shape], Callable[..., Tensor]]
    # (shape, bytes per element) -> forward and backward
    work: Callable[[Shape, int], list[roofs.Work]]
    # (shape, dtype, device) -> what else computes this operation and no other
    others: Callable[[Shape, torch.dtype, str], dict[str, Way]] = lambda *_: {}
    backends: tuple[str, ...] = ("eager", "streamed", "triton")

    @property
    def cases(self) -> dict[str, Shape]:
        """Of all devices: any may run on any."""
        return {name: shape for of in SHAPES[self.name].values() for name, shape in of.items()}

    def given(self, shape: Shape, dtype: torch.dtype, device: str) -> Given:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        own, other = self.inputs(shape, randn)
        return [x.to(dtype).requires_grad_() for x in own], [_cast(x, dtype) for x in other]

    def ways(self, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Way]:
        """Everything that computes it here."""
        # Triton's interpreter, on a CPU, is never timed.
        usable = [name for name in self.backends if name != "triton" or _triton_runs(device)]
        found = {name: Way(self.ours(shape, name)) for name in usable}
        plain, bounds = autocast(self.plain(shape), dtype), of_others(dtype)
        found["plain"] = Way(plain, bounds)
        found["compiled"] = Way(compiled(plain), bounds, compiles=True)
        return found | self.others(shape, dtype, device)


def of_others(dtype: torch.dtype) -> Bounds:
    return FAIR if dtype == torch.float32 else COARSE


def run(function: Callable[..., Tensor], given: Given) -> list[Tensor]:
    """The value and the gradients; rows have upstream gradients of their own, some negative."""
    own, other = given
    value = function(*own, *other)
    upstream = torch.linspace(-1, 2, value.numel(), device=value.device, dtype=value.dtype)
    if not value.ndim:
        upstream.fill_(1)
    return [value.detach(), *torch.autograd.grad(value, own, upstream.view_as(value))]


def errors(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Of the value and of the worst gradient: |x - y| / |y|."""
    value, *gradients = (
        ((one - other).norm() / other.norm()).item()
        for one, other in zip(found, expected, strict=True)
    )
    return value, max(gradients)


def check(
    operation: Operation, shape: Shape, name: str, dtype: str, device: str
) -> tuple[float, float] | None:
    """The errors against float64 at a size where that is affordable; None where the way cannot run.

    Raises Wrong.
    """
    small = affordable(shape)
    way = operation.ways(small, DTYPES[dtype], device)[name]
    own, other = operation.given(small, DTYPES[dtype], device)
    try:
        found = run(way.function, (own, other))
    except ValueError as error:
        if name != "triton" or not is_refusal(error):
            raise
        return None
    wide = [x.detach().double().requires_grad_() for x in own]
    expected = run(operation.ours(small, "eager"), (wide, [_cast(x, torch.double) for x in other]))
    value, gradient = errors(found, expected)
    most = way.bounds or BOUNDS[dtype]
    if not (value < most[0] and gradient < most[1]):
        raise Wrong(
            f"{operation.name} {name} {dtype} of {described(small)}: its value is off by "
            f"{value:.1e} and its gradient by {gradient:.1e}; allowed are {most[0]} and {most[1]}."
        )
    return value, gradient


def is_refusal(error: Exception) -> bool:
    """Whether mlkd_kernels said that it has no kernel for this."""
    return isinstance(error, ValueError) and "cannot run here" in str(error)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _triton_runs(device: str) -> bool:
    return device == "cuda" and mlkd_kernels.backends()["triton"] == "available"
