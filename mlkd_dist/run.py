"""What all stages of a run share, and the folder it writes to."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mlkd_dist import config as configs
from mlkd_dist import tasks
from mlkd_dist.config import Config, UserError
from mlkd_dist.inputs.quarantine import Quarantine
from mlkd_dist.models.model import lacks_head, read_config
from mlkd_dist.processes.world import World, broadcast_object
from mlkd_dist.rules.settings import differences, mathematics, paths, read_back
from mlkd_dist.saving import commit
from mlkd_dist.student import make_student

# What a run writes into its folder; where anything else lies, the folder is nobody's to empty.
RUN_FILES = (
    "config.yaml",
    "config.yaml.partial",
    "lock",
    "metrics.jsonl",
    "metrics.jsonl.partial",
    "quarantine.jsonl",
    "quarantine.jsonl.partial",
    "report.json",
    "report.json.partial",
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
    quarantine: Quarantine

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


def class_names(run: Run) -> dict[int, str] | None:
    """What the teacher calls its classes, which its student learns, whatever it called its own
    before; None where it has no names for them."""
    config = run.config
    if config.task.kind != "classification" or config.teacher.path is None:
        return None
    names = read_config(config.teacher.path, config.trust_remote_code).id2label
    return names if any(name != f"LABEL_{i}" for i, name in names.items()) else None


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


NEW, UNFINISHED, FINISHED = "new", "unfinished", "finished"


def standing(config: Config) -> str:
    """What the run folder holds for this config: NEW (nothing, or what may be replaced), or this
    very run, UNFINISHED or FINISHED. UserError where the folder cannot be had, or holds what may
    not be replaced. Changes nothing."""
    folder, settings = Path(config.run.dir), config.run
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"run.dir: {settings.dir!r} cannot be written, since {str(nearest)!r} is a file or "
            f"write-protected; choose another folder."
        )
    # Before config.yaml, a new run writes these.
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {"student", "lock"}:
        return NEW
    if other := not_of_a_run(folder):
        raise UserError(
            f"run.dir: {settings.dir!r} holds files that are no run, among them {other!r}; "
            f"choose another folder."
        )
    if settings.resume == "never":
        if settings.overwrite:
            return NEW
        raise UserError(
            f"run.dir: {settings.dir!r} holds an earlier run, which run.resume=never does not go "
            f"on with; choose another folder, or replace it with run.overwrite=true."
        )
    finished = (folder / "report.json").exists()
    # Where there are checkpoints, these tell what the paths held.
    by_name = finished or not commit.names(folder / "checkpoints")
    changed = other_settings(config, by_name)
    if changed and settings.resume != "changed":
        if settings.overwrite:
            return NEW
        raise UserError(
            f"run.dir: {settings.dir!r} holds an earlier run with other settings "
            f"({told(changed)}); choose another folder, replace it with run.overwrite=true, or go "
            f"on from it with run.resume=changed."
        )
    if finished and not changed:
        return NEW if settings.overwrite else FINISHED
    return UNFINISHED


def other_settings(config: Config, by_name: bool) -> list[str]:
    """What of the run there differs in its mathematics, and with `by_name` in its sources."""
    theirs = read_back(Path(config.run.dir) / "config.yaml")
    if theirs is None:
        return ["config.yaml cannot be read"]
    ours, theirs = (
        mathematics(each) | (paths(each) if by_name else {}) for each in (config, theirs)
    )
    return differences(theirs, ours)


def told(changes: list[str]) -> str:
    return "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")


@contextmanager
def alone(folder: Path, world: World, key: str = "run.dir") -> Iterator[None]:
    """While open, no other program on this file system writes to the run folder. The system drops
    the lock with the process, however that ends."""

    path = folder / "lock"

    def lock() -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else it is one that was removed in between.
            held = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise UserError(
                f"{key}: another program is at work in {str(folder)!r}; wait for it or end it."
            )
        return file

    held: list[Any] = []
    on_first(world, user_errors(lambda: held.append(lock())))
    try:
        yield
    finally:
        for file in held:
            path.unlink(missing_ok=True)
            file.close()
            if not any(folder.iterdir()):
                folder.rmdir()


def not_of_a_run(folder: Path) -> str | None:
    """The name of something there that no run has written; None where all is an earlier run's."""
    made = folder / "config.yaml"
    if made.is_file() and not made.read_bytes().startswith(configs.HEADER.encode()):
        return made.name
    strange = sorted(path.name for path in folder.iterdir() if path.name not in RUN_FILES)
    return next(iter(strange), None)


def make_folder(config: Config, world: World) -> str:
    """The run folder of a new run, with the resolved config in it, instead of what an earlier run
    left there; returns the folder of the student that training starts from. Both are made beside
    it first: where the student cannot be cut, the earlier run is still there."""

    def make() -> str:
        folder = Path(config.run.dir)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            new = Path(beside)
            configs.save(config, new / "config.yaml")
            student_path = starting_student(config, new) or str(folder / "student")
            folder.mkdir(exist_ok=True)
            for left in folder.iterdir():
                if left.name != "lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            # Last the config, by which a folder is known to hold a run.
            for made in sorted(new.iterdir(), key=lambda path: path.name == "config.yaml"):
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


def list_bad_rows(run: Run) -> None:
    """Say how many rows of the data were left out, and list them in the run folder."""
    path = run.folder / "quarantine.jsonl"

    def write() -> None:
        if any(run.quarantine.counts.values()):
            commit.write_whole(path, run.quarantine.listed())
        else:
            path.unlink(missing_ok=True)

    on_first(run.world, user_errors(write))
    run.quarantine.tell(path)


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


def on_first(world: World, work: Callable[[], Any], error: type[Exception] = UserError) -> Any:
    """`work` on the first process, its result on all; such an error there is raised on all."""
    outcome = None
    if world.first:
        try:
            outcome = ("done", work())
        except error as raised:
            outcome = ("error", str(raised))
    kind, value = broadcast_object(outcome)
    if kind == "error":
        raise error(value)
    return value
