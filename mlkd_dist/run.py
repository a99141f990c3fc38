"""What all stages of a run share, and the folder it writes to."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mlkd_dist import config as configs
from mlkd_dist import tasks
from mlkd_dist.config import Config, UserError
from mlkd_dist.engine import World, broadcast_object
from mlkd_dist.model import lacks_head, read_config
from mlkd_dist.student import make_student

# What a run writes into its folder; where anything else lies, the folder is nobody's to empty.
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "report.json",
    "tb",
    "student",
    "checkpoints",
    "export",
    "export.partial",
    "export-dense",
    "export-dense.partial",
    "projections.safetensors",
)
# Outputs of the heads whose task leaves no choice: a number; the start and the end of a span.
FIXED_HEADS = {"regression": 1, "question_answering": 2}


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


def class_count(run: Run) -> int | None:
    """Outputs of a new head for the student: of one that is trained on labels alone, or that comes
    without a head to a teacher; None where it must have its head already."""
    config = run.config
    if config.task.kind not in ("classification", *FIXED_HEADS):
        return None
    if config.teacher.path is not None:
        teacher = read_config(config.teacher.path, config.trust_remote_code)
        return teacher.num_labels if headless_student(run) else None
    if config.task.kind in FIXED_HEADS:
        return FIXED_HEADS[config.task.kind]
    return config.task.labels or max(run.train["labels"]) + 1


def headless_student(run: Run) -> bool:
    """Whether the student is a folder without the task's head, and gets a new one."""
    config = run.config
    if config.student.path is None:
        return False
    found = read_config(config.student.path, config.trust_remote_code)
    return lacks_head(found, run.task.model_class)


def source(config: Config) -> str:
    """The model that the student is, or is cut out of; the tokenizer is its."""
    return config.student.path or config.teacher.path


def check_folder(config: Config) -> None:
    """UserError where the run folder cannot be had, or holds what may not be replaced. Changes
    nothing."""
    folder = Path(config.run.dir)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"run.dir: {config.run.dir!r} cannot be written, since {str(nearest)!r} is a file or "
            f"write-protected; choose another folder."
        )
    if not folder.exists() or not any(folder.iterdir()):
        return
    if other := not_of_a_run(folder):
        raise UserError(
            f"run.dir: {config.run.dir!r} holds files that are no run, among them {other!r}; "
            f"choose another folder."
        )
    if not config.run.overwrite:
        raise UserError(
            f"run.dir: {config.run.dir!r} holds an earlier run; choose another folder, or replace "
            f"it with run.overwrite=true."
        )


def not_of_a_run(folder: Path) -> str | None:
    """The name of something there that no run has written; None where all is an earlier run's."""
    made = folder / "config.yaml"
    if made.is_file() and not made.read_bytes().startswith(configs.HEADER.encode()):
        return made.name
    strange = sorted(path.name for path in folder.iterdir() if path.name not in RUN_FILES)
    return next(iter(strange), None)


def make_folder(config: Config, world: World) -> str:
    """The run folder, with the resolved config in it, instead of what an earlier run left there;
    returns the folder of the student that training starts from. Both are made beside it first:
    where the student cannot be cut, the earlier run is still there."""

    def make() -> str:
        check_folder(config)
        folder = Path(config.run.dir)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            new = Path(beside)
            configs.save(config, new / "config.yaml")
            student_path = starting_student(config, new) or str(folder / "student")
            folder.mkdir(exist_ok=True)
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            for made in new.iterdir():
                made.rename(folder / made.name)
        return student_path

    return on_first(world, user_errors(make))


def starting_student(config: Config, folder: Path) -> str | None:
    """The folder that is given; None where the student was cut out of the teacher, into
    `folder`/student."""
    student, trust = config.student, config.trust_remote_code
    if student.path is not None:
        return student.path
    task = tasks.load(config.task.kind)
    make_student(task.model_class, config.teacher.path, student, folder / "student", trust)
    return None


def user_errors(work: Callable[[], Any]) -> Callable[[], Any]:
    """While data and models are read, a ValueError of a task, or a file that cannot be read or
    written, is about what a person gave."""

    def guarded() -> Any:
        try:
            return work()
        except UserError:
            raise
        except (ValueError, OSError) as error:
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
