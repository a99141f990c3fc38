"""The program: a config in, a distilled student out.

mlkd distill CONFIG [key=value ...]
deepspeed --module mlkd_dist.distill CONFIG [key=value ...]
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlkd_dist import config as configs
from mlkd_dist.checkpoint import export, load_projections, save_projections
from mlkd_dist.config import Config, StageConfig, UserError
from mlkd_dist.data import Sampler, batches
from mlkd_dist.engine import Engine, World, backward, start, stop, student_config, student_engine
from mlkd_dist.evaluate import Evaluator, report
from mlkd_dist.finetune import finetune_config, finished, with_finetuned_teacher
from mlkd_dist.metrics import Metrics
from mlkd_dist.model import quiet, read_config
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.preflight import check_start, prepared
from mlkd_dist.run import Run, class_count, headless_student, make_folder, on_first, source
from mlkd_dist.schedule import learning_rate, opening, total_steps
from mlkd_dist.student import Student, load_student
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Trace
from mlkd_kernels import choose


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mlkd_dist.distill", description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--command", choices=COMMANDS, default="distill", help="what to do")
    parser.add_argument(
        "--local_rank", help="given by the deepspeed launcher; the environment says it too"
    )
    given = parser.parse_args(arguments)
    try:
        config = configs.load(given.config, given.settings)
        world = start()
        quiet()
        COMMANDS[given.command](config, world)
        return 0
    except UserError as error:
        # Every process raises it; one says it.
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"mlkd: error: {error}", file=sys.stderr)
        return 2
    finally:
        stop()


def distill(config: Config, world: World) -> None:
    """All stages of a run, and its report."""
    check_start(config, world)
    if config.teacher.finetune is not None:
        finetune_teacher(config, world)
        config = with_finetuned_teacher(config)
    run = prepared(config, world, source(config))
    student_path = make_folder(config, world)
    evaluator = Evaluator(run)
    # Its time is that of the student after, which is taken beside the teacher's. A student that is
    # still to get its head says nothing yet.
    given = (student_path, config.student.dtype, config.student.attention)
    before = None if headless_student(run) else evaluator(*given, timed=False)
    train(run, student_path)
    report(evaluator, before)


def train(run: Run, student_path: str) -> None:
    """Each stage loads the student that the one before left, and inherits no optimizer state."""
    first_step = 0
    for index, stage in enumerate(run.config.stages):
        first_step += run_stage(run, stage, index, student_path, first_step)
        student_path = str(run.folder / "export")


def run_stage(run: Run, stage: StageConfig, index: int, student_path: str, first_step: int) -> int:
    """One stage from its first step to the exported student; returns its number of steps."""
    config, world, batch = run.config, run.world, run.config.batch
    sampler = Sampler(
        len(run.train),
        batch.micro_batch,
        batch.grad_accum,
        world.rank,
        world.size,
        seed=config.run.seed + index,
    )
    steps = total_steps(stage, sampler.steps_per_epoch)
    objective = stage_objective(run, stage, student_path)
    teacher = stage_teacher(run, objective)
    # From here on; the teacher is as deep as all its layers need.
    objective.opening = opening(f"stages[{index}]", stage, objective.layers, steps)
    student = Student(trainable(run, student_path), objective)
    load_projections(student.projections, run.folder / "projections.safetensors")
    lr = config.optim.lr if stage.lr is None else stage.lr
    engine = student_engine(
        student.to(world.device), config, learning_rate(config.optim, steps), lr
    )
    engine.train()
    weights = [term.options["weight"] for term in objective.terms]
    metrics = Metrics(
        run.folder,
        world,
        stage.name,
        objective.names,
        weights,
        first_step,
        steps,
        config.log_every,
        choose(config.kernels),
    )

    def collate(rows: list[dict[str, Any]], keep: list[bool]) -> Batch:
        return run.task.collate(rows, keep, run.tokenizer)

    loader = batches(
        run.train, sampler, 0, steps, collate, config.data.workers, world.device.type == "cuda"
    )
    for step, micro_batches in enumerate(loader):
        moved = [micro_batch.to(world.device) for micro_batch in micro_batches]
        train_step(
            teacher,
            engine,
            objective,
            moved,
            metrics,
            step,
            seed=(config.run.seed, first_step + step),
        )
    metrics.close()
    export(student.model, run.tokenizer, run.folder / "export")
    save_projections(student.projections, run.folder / "projections.safetensors")
    if teacher is not None:
        teacher.close()
    engine.destroy()
    return steps


def train_step(
    teacher: Teacher | None,
    student: Engine,
    objective: Objective,
    micro_batches: list[Batch],
    metrics: Metrics,
    step: int,
    seed: tuple[int, int],
) -> None:
    rows = objective.global_rows(micro_batches)
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


def stage_objective(run: Run, stage: StageConfig, student_path: str) -> Objective:
    trust = run.config.trust_remote_code

    def widths(path: str) -> Widths:
        found = read_config(path, trust)
        return Widths(found.hidden_size, found.num_hidden_layers)

    teacher = run.config.teacher.path
    return Objective(
        stage.losses,
        stage.layers,
        widths(student_path),
        widths(teacher) if teacher else None,
        run.config.kernels,
        run.world,
        run.task.vocabulary,
    )


def stage_teacher(run: Run, objective: Objective) -> Teacher | None:
    if not objective.reads_teacher:
        return None
    settings = run.config.teacher
    return Teacher(
        settings.path,
        settings,
        run.task.model_class,
        objective.needs(1),
        run.world,
        run.config.trust_remote_code,
    )


def trainable(run: Run, path: str) -> Any:
    config = run.config
    return load_student(
        run.task.model_class,
        path,
        config.student,
        student_config(config),
        class_count(run),
        config.trust_remote_code,
    )


def finetune_teacher(config: Config, world: World) -> None:
    """Train `teacher.path` on the task's labels, with the student's engine and hard labels. A
    finished one that was made by the same settings is used again."""
    own = finetune_config(config)
    if on_first(world, lambda: finished(own)):
        return
    check_start(own, world)
    run = prepared(own, world, source(own))
    make_folder(own, world)
    train(run, own.student.path)
    report(Evaluator(run))


def evaluate(config: Config, world: World) -> None:
    """The report of a run that is done, once more."""
    config = with_finetuned_teacher(config)
    export = Path(config.run.dir) / "export"
    if not export.is_dir():
        raise UserError(f"run.dir: {config.run.dir!r} has no export; run `mlkd distill` first.")
    report(Evaluator(prepared(config, world, str(export))))


COMMANDS = {"distill": distill, "finetune": finetune_teacher, "evaluate": evaluate}


if __name__ == "__main__":
    sys.exit(main())
