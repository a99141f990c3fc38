"""The batch of a whole process group, seen from one rank, with gradients.

Every rank holds equally many samples.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.samples = group, x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank's rows read every sample: its gradient is the sum of what all ranks found.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(0, dist.get_rank(ctx.group) * ctx.samples, ctx.samples), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The other ranks' shares reach this rank's samples through `gather`, not through here.
        return grad, None


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # [n, ...] -> [N, ...]
    """The samples of all ranks, in rank order. Every rank must also run its backward."""
    return x if group is None else _Gather.apply(x, group)


def gather_mask(keep: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # [n] bool -> [N] bool
    # Not every communication library carries bool.
    return gather(keep.to(torch.uint8), group).bool()


def own_indices(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # [n, ...] -> [n]
    """Where this rank's samples stand in the gathered batch."""
    start = 0 if group is None else dist.get_rank(group) * x.shape[0]
    return torch.arange(start, start + x.shape[0], device=x.device)


def global_samples(x: Tensor, group: dist.ProcessGroup | None) -> int:
    return len(x) * (1 if group is None else dist.get_world_size(group))


def total(share: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the ranks' shares, the same number on every rank."""
    return share if group is None else _Total.apply(share, group)
