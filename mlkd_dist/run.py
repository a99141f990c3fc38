"""What all stages of a run share, and all that is checked before any weights load."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mlkd_dist import config as configs
from mlkd_dist import tasks
from mlkd_dist.config import Config, UserError
from mlkd_dist.data import prepare
from mlkd_dist.engine import World, broadcast_object
from mlkd_dist.model import read_config, read_tokenizer, refuse_other_tokenizer
from mlkd_dist.student import make_student
from mlkd_kernels import choose


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


def check_folder(config: Config, world: World) -> None:
    """An empty run folder with the resolved config in it, and a kernel backend that is there."""

    def make() -> None:
        choose(config.kernels)
        folder = Path(config.run.dir)
        if (folder / "config.yaml").exists() or (folder / "metrics.jsonl").exists():
            if not config.run.overwrite:
                raise UserError(
                    f"run.dir: {config.run.dir!r} holds an earlier run; choose another folder, or "
                    f"replace it with "
                    "run.overwrite=true."
                )
            shutil.rmtree(folder)
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"run.dir: {config.run.dir!r} holds files that are no run; choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        configs.save(config, folder / "config.yaml")

    on_first(world, user_errors(make))


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
    """Task, tokenizer and tokenised data. The first process reads and checks; the others then find
    its cache."""
    task = tasks.load(config.task.kind)(config.task, config.data)
    trust = config.trust_remote_code

    def read() -> tuple[PreTrainedTokenizerBase, Dataset, Dataset]:
        tokenizer = read_tokenizer(student_path, trust)
        data = config.data
        train, held_out = prepare(
            data.train,
            data.validation,
            data.validation_fraction,
            task,
            tokenizer,
            data.max_length,
            data.cache,
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


def check_against_models(
    config: Config, task: Any, student_path: str, train: Dataset, held_out: Dataset
) -> None:
    """What only data and model configs together can tell."""
    student = read_config(student_path, config.trust_remote_code)
    teacher = (
        read_config(config.teacher.path, config.trust_remote_code) if config.teacher.path else None
    )
    for model, path in ((student, student_path), (teacher, config.teacher.path)):
        limit = getattr(model, "max_position_embeddings", None)
        if limit is not None and config.data.max_length > limit:
            raise UserError(
                f"data.max_length: {config.data.max_length} is more than the {limit} tokens "
                f"{path!r} takes."
            )
    if config.task.kind != "classification":
        return
    if teacher is not None and teacher.num_labels != student.num_labels:
        raise UserError(
            f"teacher {config.teacher.path!r} has {teacher.num_labels} classes and student "
            f"{student_path!r} "
            f"{student.num_labels}; use models of the same task, or student.from_teacher."
        )
    classes = config.task.labels or (
        teacher.num_labels if teacher is not None else max(train["labels"]) + 1
    )
    for name, rows in (("data.train", train), ("data.validation", held_out)):
        try:
            task.check_labels(rows["labels"], classes)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error


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
