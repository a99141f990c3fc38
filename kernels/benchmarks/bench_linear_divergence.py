"""Times and memory of linear_divergence: python kernels/benchmarks/bench_linear_divergence.py -h"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from baselines import autocast, in_chunks, liger_jsd, score_kl, torch_cross_entropy
from harness import main
from operation import Given, Operation, Way, of_others
from roofs import Work
from shapes import Heads
from torch import Tensor

from mlkd_kernels import linear_divergence

# Liger's names of the kinds that it has.
LIGER = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
CROSS_ENTROPY = "cross_entropy"


def inputs(shape: Heads, randn: Callable[..., Tensor]) -> Given:
    def head(width: int) -> list[Tensor]:
        # Logits of a spread of about 2, as early in training.
        return [randn(shape.rows, width), 2 * randn(shape.vocabulary, width) / width**0.5]

    student = head(shape.student_width)
    if shape.kind == CROSS_ENTROPY:
        return student, [randn(shape.rows).mul(1e4).long() % shape.vocabulary]
    return student, head(shape.teacher_width)


def ours(shape: Heads, backend: str) -> Callable[..., Tensor]:
    options = {"kind": shape.kind, "backend": backend}
    if shape.kind == CROSS_ENTROPY:
        return lambda x, weight, labels: linear_divergence(
            x, weight, None, None, labels=labels, **options
        )
    return partial(linear_divergence, **options)


def plain(shape: Heads) -> Callable[..., Tensor]:
    if shape.kind == CROSS_ENTROPY:
        return lambda x, weight, labels: F.cross_entropy(
            (x @ weight.mT).float(), labels, reduction="sum"
        )

    def run(x: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        student, teacher = x @ weight.mT, teacher @ teacher_weight.mT
        if shape.kind == "forward_kl":
            return score_kl(teacher, student).sum()
        if shape.kind == "reverse_kl":
            return score_kl(student, teacher).sum()
        assert shape.kind == "jsd", shape.kind
        p, q = (F.log_softmax(z, dim=-1, dtype=torch.float32) for z in (teacher, student))
        middle = torch.logaddexp(p, q) - math.log(2)
        halves = (F.kl_div(middle, z, log_target=True, reduction="sum") for z in (p, q))
        return sum(halves) / 2

    return run


def others(shape: Heads, dtype: torch.dtype, device: str) -> dict[str, Way]:
    bounds = of_others(dtype)
    if shape.kind == CROSS_ENTROPY:
        found = torch_cross_entropy()
        return {} if found is None else {"torch linear_cross_entropy": Way(found, bounds)}
    chunked = in_chunks(autocast(plain(shape), dtype))
    ways = {"compiled, 8 chunks": Way(chunked, bounds, compiles=True)}
    liger = liger_jsd(LIGER[shape.kind]) if device == "cuda" else None
    return ways if liger is None else ways | {"liger": Way(liger, bounds)}


def work(shape: Heads, size: int) -> list[Work]:
    """The gradient is made where the logits are, in the forward: the backward only multiplies."""
    sides = 1 if shape.kind == CROSS_ENTROPY else 2
    widths = [shape.student_width, shape.teacher_width][:sides]
    scores = shape.rows * shape.vocabulary
    read = (shape.rows + shape.vocabulary) * sum(widths) * size
    written = (shape.rows + shape.vocabulary) * shape.student_width * size
    forward = Work(2 * scores * sum(widths), sides * scores, read)
    return [forward, Work(4 * scores * shape.student_width, sides * scores, written)]


LINEAR_DIVERGENCE = Operation("linear_divergence", inputs, ours, plain, work, others)

if __name__ == "__main__":
    main(LINEAR_DIVERGENCE)
