"""The program: a config in, a distilled student out.

    mlkd distill CONFIG [key=value ...]
    deepspeed --module mlkd_dist.distill CONFIG [key=value ...]
"""

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlkd_dist import config as configs
from mlkd_dist import tasks
from mlkd_dist.checkpoint import export, load_projections, save_projections
from mlkd_dist.config import Config, StageConfig, StudentConfig, TeacherConfig, UserError
from mlkd_dist.data import Sampler, batches, prepare
from mlkd_dist.engine import Engine, World, barrier, broadcast_object, start, stop, student_config, student_engine
from mlkd_dist.evaluate import Evaluator, table
from mlkd_dist.metrics import Metrics
from mlkd_dist.model import quiet, read_config, read_tokenizer, refuse_other_tokenizer
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.schedule import learning_rate, total_steps
from mlkd_dist.student import Student, load_student, make_student
from mlkd_dist.tasks import Batch
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Trace
from mlkd_kernels import backends


@dataclass
class Run:
    """What all stages of a run share."""

    config: Config
    world: World
    task: Any
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mlkd_dist.distill", description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--finetune", action="store_true", help="only train the teacher on the task's labels")
    parser.add_argument("--local_rank", help="given by the deepspeed launcher; the environment says it too")
    given = parser.parse_args(arguments)
    world = None
    try:
        config = configs.load(given.config, given.settings)
        world = start()
        quiet()
        finetune_teacher(config, world) if given.finetune else distill(config, world)
        return 0
    except UserError as error:
        # Every process raises it; one says it.
        if world is None or world.first:
            print(f"mlkd: error: {error}", file=sys.stderr)
        return 2
    finally:
        stop()


def distill(config: Config, world: World) -> None:
    """All stages of a run, and its report."""
    if config.teacher.finetune is not None:
        path = finetune_teacher(config, world)
        config = copy.deepcopy(config)
        config.teacher.path, config.teacher.finetune = path, None
    check_folder(config, world)
    student_path = on_first(world, lambda: starting_student(config))
    run = prepared(config, world, student_path)
    evaluator = Evaluator(config, run.task, run.tokenizer, run.held_out, world)
    student = config.student
    before = evaluator(student_path, student.dtype, student.attention) if config.teacher.path else None
    train(run, student_path)
    report(run, evaluator, before)


def train(run: Run, student_path: str) -> None:
    """Each stage loads the student that the one before left, so that none inherits optimizer state."""
    first_step = 0
    for index, stage in enumerate(run.config.stages):
        first_step += run_stage(run, stage, index, student_path, first_step)
        student_path = str(run.folder / "export")


def run_stage(run: Run, stage: StageConfig, index: int, student_path: str, first_step: int) -> int:
    """One stage from its first step to the exported student; returns its number of steps."""
    config, world, batch = run.config, run.world, run.config.batch
    sampler = Sampler(
        len(run.train), batch.micro_batch, batch.grad_accum, world.rank, world.size, seed=config.run.seed + index
    )
    steps = total_steps(stage, sampler.steps_per_epoch)
    objective = stage_objective(run, stage, student_path)
    teacher = stage_teacher(run, objective)
    student = Student(trainable(run, student_path), objective)
    load_projections(student.projections, run.folder / "projections.safetensors")
    lr = config.optim.lr if stage.lr is None else stage.lr
    engine = student_engine(student.to(world.device), config, learning_rate(config.optim, steps), lr)
    engine.train()
    weights = [term.options["weight"] for term in objective.terms]
    metrics = Metrics(
        run.folder, world, stage.name, objective.names, weights, first_step, steps, config.log_every, backend(config)
    )

    def collate(rows: list[dict[str, Any]], keep: list[bool]) -> Batch:
        return run.task.collate(rows, keep, run.tokenizer)

    loader = batches(run.train, sampler, 0, steps, collate, config.data.workers, world.device.type == "cuda")
    for step, micro_batches in enumerate(loader):
        moved = [micro_batch.to(world.device) for micro_batch in micro_batches]
        train_step(teacher, engine, objective, moved, metrics, step, seed=(config.run.seed, first_step + step))
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
    lr = student.get_lr()[0]
    for index, batch in enumerate(micro_batches):
        seen = traces[index] if traces else observe(teacher, batch, metrics)
        seed_dropout(seed, objective.world, index)
        loss, shares = student(batch, seen, rows, peers, index)
        student.backward(loss, scale_wrt_gas=False)
        # Updates the weights after the last micro-batch only.
        student.step()
        metrics.add(shares)
    metrics.step(student, step, lr, rows["sample"])


def observe(teacher: Teacher | None, batch: Batch, metrics: Metrics) -> Trace | None:
    if teacher is None:
        return None
    with metrics.teacher_clock():
        return teacher(batch)


def look_ahead(
    teacher: Teacher | None, objective: Objective, micro_batches: list[Batch], metrics: Metrics
) -> list[Trace]:
    """The teacher's traces of the whole step, where a term compares samples across its micro-batches; else none."""
    return [observe(teacher, batch, metrics) for batch in micro_batches] if objective.batch_terms else []


def sample_vectors(
    student: Engine, objective: Objective, micro_batches: list[Batch], seed: tuple[int, int]
) -> list[dict[str, Tensor]] | None:
    """The student's sample vectors of all micro-batches, before the pass that trains: a term over the global batch
    needs those of micro-batches whose turn is yet to come. With one micro-batch there are none."""
    if not objective.batch_terms or len(micro_batches) == 1:
        return None
    vectors = []
    with torch.no_grad():
        for index, batch in enumerate(micro_batches):
            seed_dropout(seed, objective.world, index)
            vectors.append(student(batch))
    return vectors


def seed_dropout(seed: tuple[int, int], world: World, index: int) -> None:
    """Dropout is a function of seed, step, process and micro-batch: both passes over a micro-batch draw the same, and
    so does a run that continues here."""
    run_seed, step = seed
    torch.manual_seed(hash((run_seed, step, world.rank, index)) & (2**63 - 1))


def stage_objective(run: Run, stage: StageConfig, student_path: str) -> Objective:
    trust = run.config.trust_remote_code

    def widths(path: str) -> Widths:
        found = read_config(path, trust)
        return Widths(found.hidden_size, found.num_hidden_layers)

    teacher = run.config.teacher.path
    return Objective(
        stage.losses, stage.layers, widths(student_path), widths(teacher) if teacher else None, backend(run.config), run.world
    )


def stage_teacher(run: Run, objective: Objective) -> Teacher | None:
    if not objective.reads_teacher:
        return None
    settings = run.config.teacher
    return Teacher(
        settings.path, settings, run.task.model_class, objective.needs(1), run.world, run.config.trust_remote_code
    )


def trainable(run: Run, path: str) -> Any:
    config = run.config
    return load_student(
        run.task.model_class, path, config.student, student_config(config), class_count(run), config.trust_remote_code
    )


def class_count(run: Run) -> int | None:
    """Classes of a new head for a model that is trained on labels alone; None where it must have its head already."""
    if run.config.task.kind != "classification" or run.config.teacher.path is not None:
        return None
    return run.config.task.labels or max(run.train["labels"]) + 1


def backend(config: Config) -> str:
    """What the losses run on."""
    if config.kernels != "auto":
        return config.kernels
    return next(name for name in ("triton", "streamed", "eager") if backends()[name] == "available")


def finetune_teacher(config: Config, world: World) -> str:
    """Train `teacher.path` on the task's labels, with the student's engine and hard labels; the folder of the result.
    A finished one that was made by the same settings is used again."""
    own = finetune_config(config)
    folder = Path(own.run.dir)
    done = on_first(world, lambda: finished(own, folder))
    if not done:
        check_folder(own, world)
        run = prepared(own, world, own.student.path)
        train(run, own.student.path)
        report(run, Evaluator(own, run.task, run.tokenizer, run.held_out, world), None)
    return str(folder / "export")


def finetune_config(config: Config) -> Config:
    if config.teacher.path is None:
        raise UserError("teacher.path: finetune trains this model; give a folder, package:NAME/path or hub name.")
    if config.task.kind == "embedding":
        raise UserError("task.kind: the embedding task has no labels to train on; finetune needs another task.")
    settings = config.teacher.finetune or configs.FinetuneConfig(epochs=1)
    own = copy.deepcopy(config)
    own.run.dir = settings.dir or f"{config.run.dir.rstrip('/')}-teacher"
    own.student = StudentConfig(path=config.teacher.path, attention=config.teacher.attention)
    own.student.zero_stage, own.student.dtype = config.student.zero_stage, config.student.dtype
    own.teacher = TeacherConfig(path=None, zero_stage=config.teacher.zero_stage)
    stage = StageConfig(name="finetune", steps=settings.steps, epochs=settings.epochs, lr=settings.lr)
    stage.losses = {"hard_labels": {}}
    own.stages = [stage]
    configs.check(own)
    return own


def finished(own: Config, folder: Path) -> bool:
    """Whether this fine-tuning is there already. UserError where the folder holds one made by other settings."""
    if not (folder / "report.json").exists():
        return False
    ours = asdict(own)
    theirs = asdict(configs.load(folder / "config.yaml"))
    # How it is launched and logged does not change the result.
    different = [key for key in ours if key not in ("launch", "log_every", "run") and ours[key] != theirs[key]]
    if ours["run"]["seed"] != theirs["run"]["seed"]:
        different.append("run.seed")
    if different:
        raise UserError(
            f"teacher.finetune: {str(folder)!r} holds a teacher that was fine-tuned with other settings "
            f"({', '.join(different)}); remove that folder, or set teacher.finetune.dir to another."
        )
    return True


def on_first(world: World, work: Callable[[], Any]) -> Any:
    """`work` on the first process, its result on all; a UserError there is raised on all."""
    outcome = None
    if world.first:
        try:
            outcome = ("done", work())
        except UserError as error:
            outcome = ("error", str(error))
    kind, value = broadcast_object(outcome)
    if kind == "error":
        raise UserError(value)
    return value


def check_folder(config: Config, world: World) -> None:
    """An empty run folder with the resolved config in it, and a kernel backend that is there."""

    def make() -> None:
        folder = Path(config.run.dir)
        if (folder / "config.yaml").exists() or (folder / "metrics.jsonl").exists():
            if not config.run.overwrite:
                raise UserError(
                    f"run.dir: {config.run.dir!r} holds an earlier run; choose another folder, or replace it with "
                    "run.overwrite=true."
                )
            shutil.rmtree(folder)
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"run.dir: {config.run.dir!r} holds files that are no run; choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        configs.save(config, folder / "config.yaml")
        state = backends().get(backend(config))
        if state != "available":
            raise UserError(f"kernels: {config.kernels!r} is not available: {state}; use kernels=auto.")

    on_first(world, make)


def starting_student(config: Config) -> str:
    """The folder that training loads: the given one, or one cut out of the teacher."""
    student, trust = config.student, config.trust_remote_code
    if student.path is not None:
        return student.path
    out = Path(config.run.dir) / "student"
    task = tasks.load(config.task.kind)
    make_student(task.model_class, config.teacher.path, student.from_teacher, out, trust)
    return str(out)


def prepared(config: Config, world: World, student_path: str) -> Run:
    """Task, tokenizer and tokenised data. The first process reads and checks; the others then find its cache."""
    task = tasks.load(config.task.kind)(config.task, config.data)
    trust = config.trust_remote_code

    def read() -> tuple[PreTrainedTokenizerBase, Dataset, Dataset]:
        tokenizer = read_tokenizer(student_path, trust)
        data = config.data
        train, held_out = prepare(
            data.train, data.validation, data.validation_fraction, task, tokenizer, data.max_length, data.cache
        )
        return tokenizer, train, held_out

    def read_and_check() -> None:
        tokenizer, train, held_out = read()
        if config.teacher.path is not None and config.student.path is not None:
            teacher = read_tokenizer(config.teacher.path, trust)
            refuse_other_tokenizer(teacher, tokenizer, config.teacher.path, student_path)
        check_against_models(config, task, student_path, train, held_out)

    on_first(world, user_errors(read_and_check))
    return Run(config, world, task, *read())


def user_errors(work: Callable[[], Any]) -> Callable[[], Any]:
    """While data and models are read, a ValueError of a task is about what a person gave."""

    def guarded() -> Any:
        try:
            return work()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    return guarded


def check_against_models(config: Config, task: Any, student_path: str, train: Dataset, held_out: Dataset) -> None:
    """What only data and model configs together can tell."""
    student = read_config(student_path, config.trust_remote_code)
    teacher = read_config(config.teacher.path, config.trust_remote_code) if config.teacher.path else None
    for model, path in ((student, student_path), (teacher, config.teacher.path)):
        limit = getattr(model, "max_position_embeddings", None)
        if limit is not None and config.data.max_length > limit:
            raise UserError(f"data.max_length: {config.data.max_length} is more than the {limit} tokens {path!r} takes.")
    if config.task.kind != "classification":
        return
    if teacher is not None and teacher.num_labels != student.num_labels:
        raise UserError(
            f"teacher {config.teacher.path!r} has {teacher.num_labels} classes and student {student_path!r} "
            f"{student.num_labels}; use models of the same task, or student.from_teacher."
        )
    classes = config.task.labels or (teacher.num_labels if teacher is not None else max(train["labels"]) + 1)
    for name, rows in (("data.train", train), ("data.validation", held_out)):
        try:
            task.check_labels(rows["labels"], classes)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error


def report(run: Run, evaluator: Evaluator, before: Any) -> None:
    """report.json and a table: the teacher beside the student before and after."""
    config, world = run.config, run.world
    student = evaluator(str(run.folder / "export"), config.student.dtype, config.student.attention)
    columns = {"student": student}
    if config.teacher.path is not None:
        teacher = evaluator(config.teacher.path, config.teacher.dtype, config.teacher.attention)
        columns = {"teacher": teacher, "student before": before, "student": student}
    if world.first:
        for name in columns.keys() - {"teacher"} if "teacher" in columns else ():
            columns[name][1]["agreement"] = run.task.agreement(columns[name][0], columns["teacher"][0])
        facts = {name.replace(" ", "_"): told for name, (_, told) in columns.items()}
        facts["held_out_rows"] = len(run.held_out)
        (run.folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(f"\n{table({name: told for name, (_, told) in columns.items()}, config.batch.evaluation)}\n")
        print(f"held out: {len(run.held_out)} texts; student: {run.folder / 'export'}")
        print(f"watch it: tensorboard --logdir {run.folder / 'tb'}", flush=True)
    barrier()


if __name__ == "__main__":
    sys.exit(main())
