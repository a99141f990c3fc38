"""The program: a config in, a distilled student out.

mlkd distill CONFIG [key=value ...]
deepspeed --module mlkd_dist.distill CONFIG [key=value ...]
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlkd_dist import commit
from mlkd_dist import config as configs
from mlkd_dist.checkpoint import (
    PROJECTIONS,
    Checkpoints,
    NotSaved,
    Position,
    Stateful,
    load_projections,
)
from mlkd_dist.config import Config, StageConfig, UserError
from mlkd_dist.data import Sampler, batches
from mlkd_dist.engine import (
    Engine,
    World,
    backward,
    gather_objects,
    start,
    stop,
    student_config,
    student_engine,
)
from mlkd_dist.evaluate import Evaluator, report
from mlkd_dist.finetune import finetune_config, finished, with_finetuned_teacher
from mlkd_dist.metrics import Metrics
from mlkd_dist.model import quiet, read_config
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.preflight import check_start, prepared
from mlkd_dist.resume import open_run
from mlkd_dist.run import FINISHED, Run, alone, class_count, headless_student, on_first, source
from mlkd_dist.schedule import learning_rate, opening, total_steps
from mlkd_dist.signals import REQUEUE, SIGNALLED, tell
from mlkd_dist.student import Student, load_student
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Trace
from mlkd_dist.watch import Diverged, Stopped, Watch
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
    SIGNALLED.install()
    code = program(given)
    tell("code", code)
    return code


def program(given: argparse.Namespace) -> int:
    try:
        config = configs.load(given.config, given.settings)
        world = start()
        quiet()
        COMMANDS[given.command](config, world)
        return 0
    except UserError as error:
        say(f"error: {error}")
        return 2
    except Stopped as error:
        say(str(error))
        return REQUEUE
    except (Diverged, NotSaved) as error:
        say(f"error: {error}")
        return 1
    finally:
        stop()


def say(text: str) -> None:
    """Every process raises the same; one says it."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"mlkd: {text}", file=sys.stderr, flush=True)


def distill(config: Config, world: World) -> None:
    """All stages of a run, and its report; or what of it is still to be done."""
    found = check_start(config, world)
    if found == FINISHED:
        say(f"{config.run.dir!r} is finished; run.overwrite=true makes it anew.")
        return
    if config.teacher.finetune is not None:
        finetune_teacher(config, world)
        config = with_finetuned_teacher(config)
    whole_run(config, world, found, compare=True)


def whole_run(config: Config, world: World, found: str, compare: bool) -> None:
    """From what is `found` in its folder to the report; with `compare` of the student
    before, too."""
    run = prepared(config, world, source(config))
    with alone(run.folder, world):
        student_path, checkpoints, at = open_run(run, found)
        evaluator = Evaluator(run)

        # A student that is still to get its head says nothing yet.
        compare = compare and not headless_student(run)

        def before() -> Any:
            # Its time is that of the student after, which is taken beside the teacher's.
            student = config.student
            return evaluator(student_path, student.dtype, student.attention, timed=False)

        evaluated = before() if compare and at.done == 0 else None
        with SIGNALLED.deferred():
            train(run, checkpoints, at, student_path)
        report(evaluator, evaluated or (before() if compare else None))


def train(run: Run, checkpoints: Checkpoints, at: Position, student_path: str) -> None:
    """Each stage loads the student that the one before left, and inherits no optimizer state."""
    watch = Watch(run.config.run, run.world)
    stages = run.config.stages
    while at.stage < len(stages):
        at = run_stage(run, stages[at.stage], at, student_path, checkpoints, watch)
        if watch.stop:
            raise Stopped(stopped(at))


def stopped(at: Position) -> str:
    return f"stopped after step {at.done}, with a checkpoint; the same command goes on from there."


def run_stage(
    run: Run,
    stage: StageConfig,
    at: Position,
    student_path: str,
    checkpoints: Checkpoints,
    watch: Watch,
) -> Position:
    """One stage from `at` to the exported student; returns where the next one starts."""
    config, world, batch = run.config, run.world, run.config.batch
    begun = checkpoints.root / at.start if at.start else None
    student_path = str(begun / "export") if begun else student_path
    sampler = Sampler(
        len(run.train),
        batch.micro_batch,
        batch.grad_accum,
        world.rank,
        world.size,
        seed=config.run.seed + at.stage,
    )
    steps = total_steps(stage, sampler.steps_per_epoch)
    objective = stage_objective(run, stage, student_path)
    teacher = stage_teacher(run, objective)
    # From here on; the teacher is as deep as all its layers need.
    objective.opening = opening(f"stages[{at.stage}]", stage, objective.layers, steps)
    student = Student(trainable(run, student_path), objective)
    if begun:
        load_projections(student.projections, begun / PROJECTIONS)
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
        at.first_step,
        steps,
        config.log_every,
        choose(config.kernels),
        at.step,
    )
    # What else a checkpoint of this stage carries.
    kept: dict[str, Stateful] = {"opening": objective.opening} if objective.opening else {}
    if at.name is not None:
        metrics.go_on(checkpoints.load(at, engine, kept))
    watch.begin_stage(engine.skipped_steps)

    def collate(rows: list[dict[str, Any]], keep: list[bool]) -> Batch:
        return run.task.collate(rows, keep, run.tokenizer)

    loader = batches(
        run.train,
        sampler,
        at.step,
        steps,
        collate,
        config.data.workers,
        world.device.type == "cuda",
    )
    for step, micro_batches in enumerate(loader, at.step):
        moved = [micro_batch.to(world.device) for micro_batch in micro_batches]
        train_step(
            teacher,
            engine,
            objective,
            moved,
            metrics,
            step,
            (config.run.seed, at.first_step + step),
            watch,
        )
        now = replace(at, step=step + 1)
        after_step(now, engine, checkpoints, watch)
        if watch.time_to_save and now.step < steps:
            save(now, engine, metrics, kept, checkpoints, watch)
    metrics.close()
    at = checkpoints.save_stage_end(
        replace(at, step=steps), student.model, student.projections, run.tokenizer
    )
    watch.has_saved()
    if teacher is not None:
        teacher.close()
    engine.destroy()
    return at


def after_step(at: Position, engine: Engine, checkpoints: Checkpoints, watch: Watch) -> None:
    try:
        watch.after_step(at.done, engine.skipped_steps)
    except Diverged as error:
        last = commit.latest(checkpoints.root)
        raise Diverged(
            f"{watch.skipped_in_a_row} steps in a row, up to step {at.done}, had a loss or a "
            f"gradient that is not finite; the last checkpoint is {last or 'none'}. Lower "
            f"optim.lr, or look at the data of these steps."
        ) from error


def save(
    at: Position,
    engine: Engine,
    metrics: Metrics,
    kept: dict[str, Stateful],
    checkpoints: Checkpoints,
    watch: Watch,
) -> None:
    """Within a stage. A disk that is full ends a run only where it was to end."""
    try:
        checkpoints.save(at, engine, gather_objects(metrics.state()), kept)
    except NotSaved as error:
        if watch.stop:
            raise
        say(f"warning: no checkpoint after step {at.done}: {error}; the run goes on.")
    watch.has_saved()
    if watch.stop:
        metrics.close()
        raise Stopped(stopped(at))


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
    whole_run(own, world, check_start(own, world), compare=False)


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
