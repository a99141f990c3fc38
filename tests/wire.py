"""What a process hands to the communication layer, counted under it: every collective of torch and
of DeepSpeed passes a process group."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Sent:
    kind: str
    size: float  # bytes that this process sends, in a ring
    ranks: tuple[int, ...]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, list) else []


# The method of a group, which torch renames; which of its arguments is of the size of the whole;
# how often a ring sends a share of that size to the next process.
KINDS = {
    "allreduce": (0, 2),
    "allreduce_coalesced": (0, 2),
    "broadcast": (0, 1),
    "allgather": (0, 1),
    "_allgather_base": (0, 1),
    "allgather_into_tensor_coalesced": (0, 1),
    "allgather_coalesced": (0, 1),
    "all_gather_single": (0, 1),
    "all_gather_single_coalesced": (0, 1),
    "reduce_scatter": (1, 1),
    "reduce_scatter_single": (1, 1),
    "reduce_scatter_single_coalesced": (1, 1),
    "_reduce_scatter_base": (1, 1),
    "reduce_scatter_tensor_coalesced": (1, 1),
}


@contextmanager
def counted() -> Iterator[list[Sent]]:
    """While open, what is sent is added to the list."""
    found: list[Sent] = []
    # As they stand in the class: what getattr gives of a method in C++ would not bind again.
    own = vars(dist.ProcessGroup)
    before = {kind: own[kind] for kind in KINDS if kind in own}

    def counts(kind: str) -> Any:
        whole, times = KINDS[kind]

        def call(group: dist.ProcessGroup, *args: Any, **named: Any) -> Any:
            ranks = tuple(dist.get_process_group_ranks(group))
            size = sum(t.numel() * t.element_size() for t in tensors(args[whole]))
            found.append(Sent(kind, times * size * (len(ranks) - 1) / len(ranks), ranks))
            return before[kind].__get__(group)(*args, **named)

        return call

    for kind in before:
        setattr(dist.ProcessGroup, kind, counts(kind))
    try:
        yield found
    finally:
        for kind, method in before.items():
            setattr(dist.ProcessGroup, kind, method)


def total(found: list[Sent]) -> float:
    return math.fsum(sent.size for sent in found)
