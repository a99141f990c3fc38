"""Times and memory of info_nce: python kernels/benchmarks/bench_info_nce.py --help"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import main
from operation import Given, Operation
from roofs import Work
from shapes import Contrast
from torch import Tensor

from mlkd_kernels import info_nce

# At which no softmax is one-hot.
TEMPERATURE = 0.1


def inputs(shape: Contrast, randn: Callable[..., Tensor]) -> Given:
    student, teacher = (randn(shape.samples, shape.width) for _ in range(2))
    return [student], [teacher]


def ours(shape: Contrast, backend: str) -> Callable[..., Tensor]:
    return partial(info_nce, temperature=TEMPERATURE, backend=backend)


def plain(shape: Contrast) -> Callable[..., Tensor]:
    def run(student: Tensor, teacher: Tensor) -> Tensor:
        x = F.normalize(torch.cat([student, teacher]), dim=-1)
        scores = x @ x.mT / TEMPERATURE
        own = torch.eye(len(x), dtype=torch.bool, device=x.device)
        scores = scores.masked_fill(own, torch.finfo(scores.dtype).min)
        other = torch.arange(len(x), device=x.device).roll(len(student))
        return F.cross_entropy(scores.float(), other, reduction="none").view(2, -1).mean(0)

    return run


def work(shape: Contrast, size: int) -> list[Work]:
    """2N anchors and as many others; only the students' scores are made again for the gradient."""
    n, width = shape
    moved = 2 * n * width * size
    return [Work(8 * n * n * width, 4 * n * n, moved), Work(8 * n * n * width, 2 * n * n, moved)]


INFO_NCE = Operation("info_nce", inputs, ours, plain, work)

if __name__ == "__main__":
    main(INFO_NCE)
