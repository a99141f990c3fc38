"""Times and memory of relation_kl: python kernels/benchmarks/bench_relation_kl.py --help"""

from collections.abc import Callable
from functools import partial

import torch
from baselines import AttentionCalls, attention_calls, moderate, score_kl
from harness import main
from operation import Given, Operation, Way, of_others
from roofs import Work, pairs
from shapes import Relation
from torch import Tensor

from mlkd_kernels import relation_kl


def inputs(shape: Relation, randn: Callable[..., Tensor]) -> Given:
    student, teacher = (
        moderate(width) * randn(shape.batch, shape.length, shape.heads * width)
        for width in (shape.student_width, shape.teacher_width)
    )
    return [student], [teacher]


def ours(shape: Relation, backend: str) -> Callable[..., Tensor]:
    return partial(relation_kl, heads=shape.heads, causal=shape.causal, backend=backend)


def plain(shape: Relation) -> Callable[..., Tensor]:
    def run(student: Tensor, teacher: Tensor) -> Tensor:
        scores = []
        for x in (teacher, student):
            x = _heads(x, shape)
            scores.append(x @ x.mT * x.shape[-1] ** -0.5)
        return score_kl(*scores, shape.causal)

    return run


def others(shape: Relation, dtype: torch.dtype, device: str) -> dict[str, Way]:
    if not attention_calls(dtype, device, shape.teacher_width, shape.student_width):
        return {}

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        x, y = _heads(student, shape), _heads(teacher, shape)
        return AttentionCalls.apply(x, x, y, y, shape.causal)

    return {"attention calls": Way(run, of_others(dtype))}


def work(shape: Relation, size: int) -> list[Work]:
    widths = shape.teacher_width, shape.student_width
    rows = shape.batch * shape.heads * shape.length
    count, moved = rows * shape.length, rows * sum(widths) * size
    forward, _ = pairs(count / (2 if shape.causal else 1), widths, 1, moved)
    # Every token is row and key, so backward half of the pairs do not drop out.
    return [forward, pairs(count, widths, 1, moved)[1]]


def weighted_inputs(shape: Relation, randn: Callable[..., Tensor]) -> Given:
    student, teacher = inputs(shape, randn)
    # As the objective weighs them, times their number: the gradient of one row does not vanish.
    return student, [*teacher, randn(shape.batch, shape.length).abs()]


def our_sum(shape: Relation, backend: str) -> Callable[..., Tensor]:
    return lambda student, teacher, weight: ours(shape, backend)(
        student, teacher, row_weight=weight
    )


def plain_sum(shape: Relation) -> Callable[..., Tensor]:
    rows = plain(shape)
    return lambda *given: (rows(*given[:2]) * given[2].unsqueeze(1)).sum()


def sum_work(shape: Relation, size: int) -> list[Work]:
    """The gradient is made in the forward pass, of the same scores."""
    _, both = work(shape, size)
    return [both, Work(0, 0, shape.batch * shape.heads * shape.length * shape.student_width * size)]


def _heads(x: Tensor, shape: Relation) -> Tensor:  # [B, L, R*d] -> [B, R, L, d]
    return x.unflatten(-1, (shape.heads, -1)).transpose(1, 2)


RELATION_KL = Operation("relation_kl", inputs, ours, plain, work, others)
RELATION_KL_SUM = Operation("relation_kl_sum", weighted_inputs, our_sum, plain_sum, sum_work)

if __name__ == "__main__":
    main(RELATION_KL, RELATION_KL_SUM)
