"""What an operation must do at least, and how fast a device can do it at most."""

from typing import NamedTuple

import torch


class Work(NamedTuple):
    """Of the best way known that keeps no matrix of all pairs; every way is held to the same."""

    flops: float  # of matrix products
    exps: float
    bytes: float  # to and from the device's memory


class Roofs(NamedTuple):
    flops: dict[int, float]  # of matrix products, by bytes per element
    exps: float
    bytes: float


# Rates under load and not those of the data sheets: 8192^3 products in bf16 and copies were timed
# on these devices; 132 multiprocessors at 1.6 GHz do 16 exponentials and 128 fp32 multiply-adds a
# cycle each.
_HOPPER = {2: 790e12, 4: 54e12}
DEVICES = {
    "NVIDIA H100 80GB HBM3": Roofs(_HOPPER, 3.4e12, 3.0e12),
    "NVIDIA H200": Roofs(_HOPPER, 3.4e12, 4.3e12),
}


def rates(parts: list[Work], seconds: float, dtype: torch.dtype, device: str) -> dict[str, str]:
    """The columns of a row about parts that run one after the other and took `seconds`."""
    total = Work(*map(sum, zip(*parts, strict=True)))
    roof, least = "", None
    if device in DEVICES:
        found = [binding(part, dtype, DEVICES[device]) for part in parts]
        roof, least = max(found)[1], sum(each for each, _ in found)
    return {
        "mma_tflops": f"{total.flops / seconds / 1e12:.3g}",
        "exps_per_s": f"{total.exps / seconds:.3g}",
        "gb_per_s": f"{total.bytes / seconds / 1e9:.3g}",
        "roof": roof,
        "roof_share": "" if least is None else f"{least / seconds:.3f}",
    }


def binding(work: Work, dtype: torch.dtype, roofs: Roofs) -> tuple[float, str]:
    """The seconds that the work takes where nothing is in the way, and what it waits for."""
    rates = roofs.flops[dtype.itemsize], roofs.exps, roofs.bytes
    seconds = [amount / rate for amount, rate in zip(work, rates, strict=True)]
    return max(zip(seconds, Work._fields, strict=True))


def pairs(count: int, widths: tuple[int, int], products: int, moved: int) -> list[Work]:
    """Forward and backward over `count` pairs of a row and a column.

    Backward the scores are made again and their gradient is multiplied by the student's rows
    `products` times. `moved` bytes go in or out at either end.
    """
    forward = 2 * count * sum(widths)
    backward = forward + 2 * count * products * widths[1]
    return [Work(forward, 2 * count, moved), Work(backward, 2 * count, moved)]
