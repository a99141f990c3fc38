"""All processes of a run, and what they tell one another."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:  # [...] -> [world, ...]
    """Of equal shapes; carries no gradient."""
    gathered = tensor.new_empty(dist.get_world_size(), *tensor.shape)
    dist.all_gather(list(gathered.unbind()), tensor.contiguous())
    return gathered


def broadcast_object(value: Any) -> Any:
    """What the first process has."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """What every process has, in order of rank."""
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def barrier() -> None:
    dist.barrier()
