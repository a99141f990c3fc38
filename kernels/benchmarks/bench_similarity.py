"""Times and memory of similarity_kl and similarity_mse: bench_similarity.py --help"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from baselines import score_kl
from harness import main
from operation import Given, Operation
from roofs import Work, pairs
from shapes import Samples
from torch import Tensor

from mlkd_kernels import similarity_kl, similarity_mse


def temperature(shape: Samples) -> float:
    """At which a sample's own score, log N, leaves about half of the row to the others."""
    return 1 / math.log(shape.samples)


def inputs(shape: Samples, randn: Callable[..., Tensor]) -> Given:
    widths = shape.student_width, shape.teacher_width
    student, teacher = (randn(shape.samples, width) for width in widths)
    return [student], [teacher]


def our_kl(shape: Samples, backend: str) -> Callable[..., Tensor]:
    return partial(similarity_kl, temperature=temperature(shape), backend=backend)


def our_mse(shape: Samples, backend: str) -> Callable[..., Tensor]:
    """It chooses between N x N and D x D by itself and has no backends.

    Times N^2, a sum and not a mean: the gradient of one sample does not vanish in fp16.
    """
    if backend != "eager":
        return lambda student, teacher: similarity_mse(student, teacher) * len(student) ** 2
    return lambda *given: plain_mse(shape)(
        *(x if x.dtype == torch.float64 else x.float() for x in given)
    )


def plain_kl(shape: Samples) -> Callable[..., Tensor]:
    return lambda student, teacher: score_kl(
        *(cosines(x) / temperature(shape) for x in (teacher, student))
    )


def plain_mse(shape: Samples) -> Callable[..., Tensor]:
    return lambda student, teacher: (cosines(student) - cosines(teacher)).square().sum()


def cosines(x: Tensor) -> Tensor:  # [N, D] -> [N, N]
    x = F.normalize(x, dim=-1)
    return x @ x.mT


def kl_work(shape: Samples, size: int) -> list[Work]:
    widths = shape.teacher_width, shape.student_width
    return pairs(shape.samples**2, widths, 1, shape.samples * sum(widths) * size)


def mse_work(shape: Samples, size: int) -> list[Work]:
    n, teacher, student = shape
    narrow = teacher**2 + teacher * student + student**2, student**2 + teacher * student
    full = n * (teacher + student), n * student
    moved = n * (teacher + student) * size
    return [Work(2 * n * least, 0, moved) for least in min(narrow, full, key=sum)]


SIMILARITY_KL = Operation("similarity_kl", inputs, our_kl, plain_kl, kl_work)
SIMILARITY_MSE = Operation(
    "similarity_mse", inputs, our_mse, plain_mse, mse_work, backends=("eager", "auto")
)

if __name__ == "__main__":
    main(SIMILARITY_KL, SIMILARITY_MSE)
