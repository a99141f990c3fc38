"""Whether the teacher says the same in every process, asked before a stage trains.

Processes that hold whole copies of it, or a share of one per node, read files and run kernels of
their own: a file that differs or a broken device would teach some rows something else, and no loss
would show it.
"""

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from mlkd_dist.processes.world import all_gather, broadcast_object
from mlkd_dist.run import Run
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs, Trace
from mlkd_dist.watching.watch import Desynchronised

# Of a tensor's norm: kernels of other devices round differently, in each layer anew.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
# Of the batch that all run.
ROWS = 2


def check_replicas(teacher: Teacher, run: Run) -> None:
    """Two forward passes of every process over the same rows; Desynchronised, in all, where what
    one shows is not what the others show, or not the same twice."""
    world, size = run.world, min(ROWS, run.config.batch.micro_batch, len(run.train))
    rows = [run.train[index] | {"row": index, "epoch": 0} for index in range(size)]
    batch = run.task.collate(rows, [True] * size, run.tokenizer)
    batch = broadcast_object(batch).to(world.device)
    asked = teacher.needs
    if asked == Needs():
        # One that only answers prompts shows no loss anything.
        teacher.needs = Needs(model=frozenset({"head"}))
    seen = torch.stack([summary(teacher(batch)) for _ in range(2)])
    teacher.needs = asked
    refuse_different(all_gather(seen), TOLERANCE[run.config.teacher.dtype])


def summary(trace: Trace) -> Tensor:  # [tensors, 2] fp64
    """Of each tensor of a trace, and of some logits of its head, its norm, and the sum of its rows
    with random signs: it is unlikely that two tensors have the same."""
    shown = tensors(trace)
    if trace.head is not None:
        with trace.head.opened(trace.head_input[:, -1]) as rows:
            shown.append(rows.hidden @ rows.weight.mT)
    found = []
    for tensor in shown:
        draw = torch.Generator().manual_seed(len(found))
        signs = torch.randint(0, 2, tensor.shape[-1:], generator=draw).double() * 2 - 1
        # One number per sample, as of a regression, is one row.
        row = tensor.unsqueeze(0).flatten(0, -2).sum(0, dtype=torch.float64)
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
        found.append(torch.stack([norm, row @ signs.to(row.device)]))
    return torch.stack(found)


def tensors(value: Any) -> list[Tensor]:
    """Those of real numbers in dataclasses and dicts, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return [tensor for name in value for tensor in tensors(value[name])]
    return []


def refuse_different(seen: Tensor, tolerance: float) -> None:
    """`seen` [processes, 2, tensors, 2]: what each process saw in its two passes."""
    first, second = seen.cpu().unbind(1)
    moody = unlike(first, second, tolerance)
    if moody:
        raise Desynchronised(
            f"the teacher of process {numbers(moody)} says other things in a second pass over the "
            f"same rows: its device, or its memory, is broken; nothing was trained."
        )
    apart = unlike(first, first[:1], tolerance)
    if 2 * len(apart) > len(first):
        # Then the first process is one of the odd ones.
        apart = unlike(first, first[apart[:1]], tolerance)
    if apart:
        raise Desynchronised(
            f"the teacher of process {numbers(apart)} says other things of the same rows than that "
            f"of the other {len(first) - len(apart)}; see that all machines read the same "
            f"teacher.path, and that their devices are sound; nothing was trained."
        )


def unlike(found: Tensor, expected: Tensor, tolerance: float) -> list[int]:
    """Processes. NaN is like NaN: where all have it, the first step says so."""
    norms = expected[..., :1].nan_to_num(1.0, 1.0).clamp_min(1e-12)
    same = torch.isclose(found / norms, expected / norms, 0, tolerance, equal_nan=True)
    return (~same.flatten(1).all(1)).nonzero().flatten().tolist()


def numbers(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + more
