"""One step, from the rows of a global batch to the update of the student's weights."""

import torch
from torch import Tensor

from mlkd_dist.engine import Engine, backward
from mlkd_dist.metrics import Metrics
from mlkd_dist.objective import Objective
from mlkd_dist.processes.world import World
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Trace
from mlkd_dist.watching.watch import Watch


def train_step(
    teacher: Teacher | None,
    student: Engine,
    objective: Objective,
    micro_batches: list[Batch],
    metrics: Metrics,
    step: int,
    seed: tuple[int, int],
    watch: Watch,
) -> None:
    rows = objective.global_rows(micro_batches, watch)
    traces = look_ahead(teacher, objective, micro_batches, metrics)
    vectors = sample_vectors(student, objective, micro_batches, seed)
    peers = objective.peers(micro_batches, traces, vectors)
    metrics.open_terms, metrics.open_layers = objective.open_names, objective.open_layers()
    lr, step_shares = student.get_lr()[0], []
    for index, batch in enumerate(micro_batches):
        seen = traces[index] if traces else observe(teacher, batch, metrics)
        seed_dropout(seed, objective.world, index)
        loss, shares = student(batch, seen, rows, peers, index)
        backward(student, loss)
        # Updates the weights after the last micro-batch only.
        student.step()
        metrics.add(shares)
        step_shares.append(shares)
    objective.reach.verdict()
    changed = objective.end_step(step, torch.stack(step_shares).sum(0))
    metrics.step(student, step, lr, rows["sample"], flush=changed)


def observe(teacher: Teacher | None, batch: Batch, metrics: Metrics) -> Trace | None:
    if teacher is None:
        return None
    with metrics.teacher_clock():
        return teacher(batch)


def look_ahead(
    teacher: Teacher | None, objective: Objective, micro_batches: list[Batch], metrics: Metrics
) -> list[Trace]:
    """The teacher's traces of the whole step, where a term compares samples across its
    micro-batches; else none."""
    return (
        [observe(teacher, batch, metrics) for batch in micro_batches]
        if objective.batch_terms
        else []
    )


def sample_vectors(
    student: Engine, objective: Objective, micro_batches: list[Batch], seed: tuple[int, int]
) -> list[dict[str, Tensor]] | None:
    """The student's sample vectors of all micro-batches, before the pass that trains: a term over
    the global batch needs those of micro-batches whose turn is yet to come. With one micro-batch
    there are none."""
    if not objective.batch_terms or len(micro_batches) == 1:
        return None
    vectors = []
    with torch.no_grad():
        for index, batch in enumerate(micro_batches):
            seed_dropout(seed, objective.world, index)
            vectors.append(student(batch))
    return vectors


def seed_dropout(seed: tuple[int, int], world: World, index: int) -> None:
    """Dropout is a function of seed, step, process and micro-batch: both passes over a micro-batch
    draw the same, and so does a run that continues here."""
    run_seed, step = seed
    torch.manual_seed(hash((run_seed, step, world.rank, index)) & (2**63 - 1))
