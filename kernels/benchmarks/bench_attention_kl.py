"""Times and memory of attention_kl: python kernels/benchmarks/bench_attention_kl.py --help"""

from collections.abc import Callable
from functools import partial

import torch
from baselines import AttentionCalls, attention_calls, score_kl
from harness import main
from operation import Given, Operation, Way, of_others
from roofs import Work, pairs
from shapes import Attention
from torch import Tensor

from mlkd_kernels import attention_kl


def inputs(shape: Attention, randn: Callable[..., Tensor]) -> Given:
    def projected(heads: int, width: int) -> Tensor:
        # Heads as a view of the projection's output, as models make them.
        return randn(shape.batch, shape.length, heads, width).transpose(1, 2)

    student, teacher = (
        [projected(shape.heads, width), projected(keys, width)]
        for keys, width in (
            (shape.student_keys, shape.student_width),
            (shape.teacher_keys, shape.teacher_width),
        )
    )
    return student, teacher


def ours(shape: Attention, backend: str) -> Callable[..., Tensor]:
    return partial(attention_kl, causal=shape.causal, backend=backend)


def plain(shape: Attention) -> Callable[..., Tensor]:
    def scores(query: Tensor, key: Tensor) -> Tensor:
        return query @ _repeated(key, shape).mT * query.shape[-1] ** -0.5

    return lambda query, key, teacher_query, teacher_key: score_kl(
        scores(teacher_query, teacher_key), scores(query, key), shape.causal
    )


def others(shape: Attention, dtype: torch.dtype, device: str) -> dict[str, Way]:
    if not attention_calls(dtype, device, shape.teacher_width, shape.student_width):
        return {}

    def run(query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
        keys = _repeated(key, shape), _repeated(teacher_key, shape)
        return AttentionCalls.apply(query, keys[0], teacher_query, keys[1], shape.causal)

    return {"attention calls": Way(run, of_others(dtype))}


def work(shape: Attention, size: int) -> list[Work]:
    widths = shape.teacher_width, shape.student_width
    keys = shape.teacher_keys, shape.student_keys
    rows = shape.batch * shape.heads * shape.length
    moved = (
        shape.batch
        * shape.length
        * size
        * sum((shape.heads + heads) * width for heads, width in zip(keys, widths, strict=True))
    )
    count = rows * shape.length / (2 if shape.causal else 1)
    return pairs(count, widths, 2, moved)


def _repeated(key: Tensor, shape: Attention) -> Tensor:  # [B, Hkv, L, d] -> [B, H, L, d]
    return key.repeat_interleave(shape.heads // key.shape[1], dim=1)


ATTENTION_KL = Operation("attention_kl", inputs, ours, plain, work, others)

if __name__ == "__main__":
    main(ATTENTION_KL)
