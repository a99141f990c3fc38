"""One stage of a run: its models, its steps, its checkpoints."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlkd_dist.cache.stored import StoredTeacher, state_names
from mlkd_dist.checkpoint import (
    PROJECTIONS,
    Checkpoints,
    NotSaved,
    Position,
    Stateful,
    load_projections,
)
from mlkd_dist.config import StageConfig
from mlkd_dist.engine import Engine, student_config, student_engine
from mlkd_dist.generation.on_policy import Policy, speaks, stage_policy
from mlkd_dist.inputs.batches import Sampler, batches
from mlkd_dist.metrics import Metrics, drop_logged
from mlkd_dist.models.model import read_config
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.processes.signals import say
from mlkd_dist.processes.waiting import PATIENCE, wait_at_most
from mlkd_dist.processes.world import gather_objects
from mlkd_dist.run import Run, class_count, class_names, on_first
from mlkd_dist.saving import commit
from mlkd_dist.schedule import learning_rate, opening, total_steps
from mlkd_dist.step import train_step
from mlkd_dist.student import Student, load_student
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs
from mlkd_dist.watching.replicas import check_replicas
from mlkd_dist.watching.spikes import Spikes, go_back, rows
from mlkd_dist.watching.validation import Validation
from mlkd_dist.watching.watch import Diverged, Stopped, Watch
from mlkd_kernels import choose


def stopped(at: Position) -> str:
    return f"stopped after step {at.done}, with a checkpoint; the same command goes on from there."


@dataclass
class Opened:
    """What the steps of a stage share."""

    steps: int
    sampler: Sampler
    objective: Objective
    teacher: Teacher | StoredTeacher | None
    student: Student
    engine: Engine
    metrics: Metrics
    kept: dict[str, Stateful]
    """What else a checkpoint of this stage carries."""
    policy: Policy | None
    validation: Validation | None
    spikes: Spikes | None


def run_stage(
    run: Run,
    stage: StageConfig,
    at: Position,
    student_path: str,
    checkpoints: Checkpoints,
    watch: Watch,
    validation: Validation | None,
) -> Position:
    """One stage from `at` to the exported student; returns where the next one starts, or where in
    this one to go on after a spike."""
    if at.name is None:
        # The stage before had other losses.
        checkpoints.best = None
    opened = open_stage(run, stage, at, student_path, checkpoints, validation)
    watch.begin_stage(opened.engine.skipped_steps)
    back = run_steps(run, opened, at, checkpoints, watch)
    opened.metrics.close()
    student = opened.student
    if back is not None:
        at = back
        logged = rows(checkpoints.rewinds, run.config.stages)
        on_first(run.world, lambda: drop_logged(run.folder, at.done, logged))
    else:
        at = checkpoints.save_stage_end(
            replace(at, step=opened.steps), student.model, student.projections, run.tokenizer
        )
    watch.has_saved()
    if opened.teacher is not None:
        opened.teacher.close()
    opened.engine.destroy()
    return at


def open_stage(
    run: Run,
    stage: StageConfig,
    at: Position,
    student_path: str,
    checkpoints: Checkpoints,
    validation: Validation | None,
) -> Opened:
    """The models and whatever else the stage needs, as they are at `at`."""
    config, world = run.config, run.world
    begun = checkpoints.root / at.start if at.start else None
    student_path = str(begun / "export") if begun else student_path
    sampler = stage_sampler(run, at)
    steps = total_steps(stage, sampler.steps_per_epoch)
    objective = stage_objective(run, stage, student_path)
    teacher = stage_teacher(run, objective, speaks(stage) == "teacher")
    if isinstance(teacher, Teacher) and world.size > 1:
        check_replicas(teacher, run)
    # From here on; the teacher is as deep as all its layers need.
    objective.opening = opening(f"stages[{at.stage}]", stage, objective.layers, steps)
    student = Student(trainable(run, student_path), objective)
    if begun:
        load_projections(student.projections, begun / PROJECTIONS)
    student.to(world.device)
    policy = stage_policy(run, stage, student.model, teacher)
    lr = config.optim.lr if stage.lr is None else stage.lr
    engine = student_engine(student, config, learning_rate(config.optim, steps), lr)
    engine.train()
    metrics = stage_metrics(run, stage, at, objective, steps)
    kept: dict[str, Stateful] = {"opening": objective.opening} if objective.opening else {}
    if policy is not None:
        kept["policy"] = policy
        metrics.more.append(policy.logged)
    spikes = None
    if config.run.rewind is not None:
        kept["spikes"] = spikes = Spikes(config.run.rewind, config.log_every)
        metrics.more.append(lambda steps: {"rewinds": len(checkpoints.rewinds)})
    if validation is not None:
        kept["validation"] = validation
    if at.name is not None:
        metrics.go_on(checkpoints.load(at, engine, kept))
    return Opened(
        steps,
        sampler,
        objective,
        teacher,
        student,
        engine,
        metrics,
        kept,
        policy,
        validation,
        spikes,
    )


def run_steps(
    run: Run, opened: Opened, at: Position, checkpoints: Checkpoints, watch: Watch
) -> Position | None:
    """Those that are left from `at` on; returns where to go back to after a spike."""
    engine, metrics = opened.engine, opened.metrics
    # The groups of the engines, too. Within the first step kernels are built, which takes one
    # process longer than another.
    wait_at_most(PATIENCE)
    if opened.validation is not None and opened.validation.owed:
        evaluate(opened, at, checkpoints)
    if opened.spikes is not None and at.done == 0 and at.name is None:
        # Of every later stage the start is there.
        save(at, engine, metrics, opened.kept, checkpoints, watch)
    for step, micro_batches in enumerate(step_batches(run, opened, at), at.step):
        mark = batch_mark(run, opened.sampler, step + at.skip)
        watch.begin_step(at.first_step + step, mark, not checkpoints.written)
        if opened.policy is not None:
            micro_batches = opened.policy(at.first_step + step, micro_batches)
        train_step(
            opened.teacher if opened.objective.reads_teacher else None,
            engine,
            opened.objective,
            [micro_batch.to(run.world.device) for micro_batch in micro_batches],
            metrics,
            step,
            (run.config.run.seed, at.first_step + step),
            watch,
        )
        now = replace(at, step=step + 1)
        after_step(now, engine, checkpoints, watch)
        if (back := after_spike(opened, now, checkpoints)) is not None:
            return back
        if now.step < opened.steps and between_steps(opened, now, checkpoints, watch):
            wait_at_most(run.config.launch.timeout)
        elif step == at.step:
            wait_at_most(run.config.launch.timeout)
    wait_at_most(PATIENCE)
    settle(checkpoints)
    if opened.validation is not None:
        evaluate(opened, replace(at, step=opened.steps), checkpoints)
    return None


def after_spike(opened: Opened, now: Position, checkpoints: Checkpoints) -> Position | None:
    """Where to go back to, if what the last step has logged is a spike."""
    spikes, line = opened.spikes, opened.metrics.line
    if spikes is None or line is None or (usual := spikes.usual(line)) is None:
        return None
    wait_at_most(PATIENCE)
    settle(checkpoints)
    return go_back(now, line, usual, spikes.settings, checkpoints)


def between_steps(opened: Opened, now: Position, checkpoints: Checkpoints, watch: Watch) -> bool:
    """Evaluates and saves where it is time to, and tells whether it was. What is asked to stop must
    not wait: it evaluates when it goes on."""
    validation = opened.validation
    due = validation is not None and validation.due(now)
    written = checkpoints.writing is not None and watch.written
    if not (due or watch.time_to_save or written):
        return False
    wait_at_most(PATIENCE)
    # A manifest names the best student of its time, which a better one replaces.
    settle(checkpoints)
    if due and watch.stop:
        validation.owed = True
    elif due:
        evaluate(opened, now, checkpoints)
    if watch.time_to_save:
        save(now, opened.engine, opened.metrics, opened.kept, checkpoints, watch)
    return True


def evaluate(opened: Opened, now: Position, checkpoints: Checkpoints) -> None:
    opened.validation(now, opened.engine, opened.student, opened.metrics, checkpoints)


def batch_mark(run: Run, sampler: Sampler, step: int) -> int:
    """Tells which rows of which data a step is made of."""
    return zlib.crc32(run.train._fingerprint.encode(), sampler.mark(step))


def step_batches(run: Run, opened: Opened, at: Position) -> Iterator[list[Batch]]:
    def collate(rows: list[dict[str, Any]], keep: list[bool]) -> Batch:
        batch = run.task.collate(rows, keep, run.tokenizer)
        if isinstance(opened.teacher, StoredTeacher):
            return opened.teacher.attach(batch)
        # A policy looks for the prompts in them.
        return batch if opened.policy is None else replace(batch, rows=rows)

    workers, pin = run.config.data.workers, run.world.device.type == "cuda"
    steps = at.step + at.skip, opened.steps + at.skip
    return batches(run.train, opened.sampler, *steps, collate, workers, pin)


def stage_sampler(run: Run, at: Position) -> Sampler:
    batch, world, seed = run.config.batch, run.world, run.config.run.seed + at.stage
    return Sampler(
        len(run.train), batch.micro_batch, batch.grad_accum, world.rank, world.size, seed
    )


def stage_metrics(
    run: Run, stage: StageConfig, at: Position, objective: Objective, steps: int
) -> Metrics:
    return Metrics(
        run.folder,
        run.world,
        stage.name,
        objective.names,
        [term.options["weight"] for term in objective.terms],
        at.first_step,
        steps,
        run.config.log_every,
        choose(run.config.kernels),
        at.step,
    )


def after_step(at: Position, engine: Engine, checkpoints: Checkpoints, watch: Watch) -> None:
    try:
        watch.after_step(at.done, engine.skipped_steps)
    except Diverged as error:
        wait_at_most(PATIENCE)
        settle(checkpoints)
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
        if watch.stop:
            checkpoints.settle()
    except NotSaved as error:
        if watch.stop:
            raise
        not_saved(error)
    watch.has_saved()
    if watch.stop:
        metrics.close()
        raise Stopped(stopped(at))


def settle(checkpoints: Checkpoints) -> None:
    try:
        checkpoints.settle()
    except NotSaved as error:
        not_saved(error)


def not_saved(error: NotSaved) -> None:
    say(f"warning: {error}; the run goes on.")


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


def stage_teacher(
    run: Run, objective: Objective, whole: bool = False
) -> Teacher | StoredTeacher | None:
    if not (objective.reads_teacher or whole):
        return None
    settings, needs = run.config.teacher, objective.needs(1)
    if settings.cache is not None:
        return StoredTeacher(settings.cache.dir, state_names(needs))
    # With `whole` it is loaded to its head, whatever is read of it.
    teacher = Teacher(
        settings.path,
        settings,
        run.task.model_class,
        needs.union(Needs(model=frozenset({"head"}))) if whole else needs,
        run.world,
        run.config.trust_remote_code,
    )
    teacher.needs = needs
    return teacher


def trainable(run: Run, path: str) -> Any:
    config = run.config
    model = load_student(
        run.task.model_class,
        path,
        config.student,
        student_config(config),
        class_count(run),
        config.trust_remote_code,
    )
    if names := class_names(run):
        model.config.id2label = names
        model.config.label2id = {name: index for index, name in names.items()}
    return model
