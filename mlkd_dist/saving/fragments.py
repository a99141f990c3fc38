"""What an engine trains, parameter by parameter: the part of the fp32 weights and of Adam's moments
that this process holds, as views into the engine's own memory. Beside engine.py the only file that
knows DeepSpeed's insides.

Where a part lies in its flattened parameter does not depend on how many processes there are or at
which ZeRO stage, so what was written from one layout can be read into any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlkd_dist.engine import Engine
from mlkd_dist.processes.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """Elements `start` and on of a flattened parameter."""

    name: str
    start: int
    weight: Tensor  # [n] fp32 view
    # The tensor that the optimizer knows, of which this is a part, and where.
    flat: Tensor
    offset: int
    state: dict[str, Any] = field(repr=False)  # of `flat`; empty before the first step

    def view(self, kind: str) -> Tensor:  # [n]
        if kind == "weight":
            return self.weight
        return self.state[kind].view(-1).narrow(0, self.offset, self.weight.numel())


def fragments(engine: Engine) -> list[Fragment]:
    """All that this process holds: of every parameter all of it where nothing is sharded."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return [*sharded_weights(engine)]
    if hasattr(optimizer, "update_lp_params"):
        return [*sharded_optimizer(engine)]
    return [*whole(engine)]


def adam(engine: Engine) -> torch.optim.Optimizer:
    return engine.basic_optimizer


def named(engine: Engine) -> dict[int, str]:
    """Name of each trained parameter by its id; one that is shared has its first name."""
    return {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}


def sharded_weights(engine: Engine) -> Iterator[Fragment]:  # ZeRO 3
    optimizer, names = engine.optimizer, named(engine)
    for group in optimizer.fp16_groups:
        for parameter in group:
            index, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[index]
            start = size * optimizer._get_param_partition_rank(parameter)
            # The last part is filled up to the size of the others.
            real = min(size, parameter.ds_numel - start)
            if real > 0:
                state = adam(engine).state[flat]
                weight = flat.detach().narrow(0, offset, real)
                yield Fragment(names[id(parameter)], start, weight, flat, offset, state)


def sharded_optimizer(engine: Engine) -> Iterator[Fragment]:  # ZeRO 1 and 2
    optimizer, names = engine.optimizer, named(engine)
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    for group, parameters in zip(adam(engine).param_groups, groups, strict=True):
        (flat,) = group["params"]
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is None:
                continue
            offset, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
            weight = flat.detach().narrow(0, offset, size)
            state = adam(engine).state[flat]
            yield Fragment(names[id(parameter)], start, weight, flat, offset, state)


def whole(engine: Engine) -> Iterator[Fragment]:  # ZeRO 0
    names, optimizer = named(engine), adam(engine)
    # With bf16 weights the optimizer knows fp32 copies of them.
    trained = getattr(engine.optimizer, "fp16_groups", None)
    groups = [group["params"] for group in optimizer.param_groups]
    for ours, theirs in zip(trained or groups, groups, strict=True):
        for parameter, flat in zip(ours, theirs, strict=True):
            name, weight = names[id(parameter)], flat.detach().view(-1)
            yield Fragment(name, 0, weight, flat, 0, optimizer.state[flat])


def to_write(engine: Engine, world: World) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """(name, start, parts by kind) of what this process has to write, so that all processes
    together write every element once."""
    sharded = hasattr(engine.optimizer, "update_lp_params") or hasattr(
        engine.optimizer, "fp32_partitioned_groups_flat"
    )
    for fragment in fragments(engine):
        size = fragment.weight.numel()
        first, last = 0, size
        if not sharded:
            share = -(-size // world.size)
            first, last = min(size, share * world.rank), min(size, share * (world.rank + 1))
        if first == last:
            continue
        kinds = ("weight", *(MOMENTS if fragment.state else ()))
        parts = {kind: fragment.view(kind)[first:last] for kind in kinds}
        if fragment.state:
            parts["step"] = fragment.state["step"].reshape(1)
        yield fragment.name, fragment.start + first, parts


def make_state(fragment: Fragment) -> None:
    """Adam's state as it is before the first step."""
    if fragment.state:
        return
    fragment.state["step"] = torch.zeros((), dtype=torch.float32, device=fragment.flat.device)
    for kind in MOMENTS:
        fragment.state[kind] = torch.zeros_like(fragment.flat.detach())


@torch.no_grad()
def refresh(engine: Engine) -> None:
    """The weights that the forward uses, from the fp32 ones. All processes call this."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for ours, theirs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(ours, theirs, strict=True):
                parameter.copy_(master)
