"""What all stages of a run share, and all that is checked before any weights load."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from mlkd_dist import config as configs
from mlkd_dist import tasks
from mlkd_dist.config import Config, UserError
from mlkd_dist.data import prepare
from mlkd_dist.engine import World, broadcast_object
from mlkd_dist.model import load_model, read_config, read_tokenizer, refuse_other_tokenizer
from mlkd_dist.student import make_student
from mlkd_dist.validate import Shape, check_shapes, refuse_type, shape
from mlkd_kernels import choose

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
    "projections.safetensors",
)


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


def check_start(config: Config, world: World) -> None:
    """What is refused before anything is trained or written, a teacher to fine-tune included."""

    def check() -> None:
        check_folder(config)
        try:
            choose(config.kernels)
        except ValueError as error:
            raise UserError(f"kernels: {error}") from error
        check_attention(config)
        if config.teacher.path is not None and config.student.path is not None:
            paths = config.teacher.path, config.student.path
            tokenizers = [read_tokenizer(path, config.trust_remote_code) for path in paths]
            refuse_other_tokenizer(*tokenizers, *paths)

    on_first(world, user_errors(check))


def check_attention(config: Config) -> None:
    """That the packages of flash attention are there; it would else be missed at the first step."""
    there = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
    }
    for who, model in (("teacher", config.teacher), ("student", config.student)):
        if model.attention in there and not there[model.attention]():
            raise UserError(
                f"{who}.attention: {model.attention} needs a GPU and the package flash-attn, which "
                f"are not here; use sdpa."
            )


def check_folder(config: Config) -> None:
    """UserError where the run folder cannot be had, or holds what may not be replaced. Changes
    nothing."""
    folder = Path(config.run.dir)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not is_run(folder):
        raise UserError(
            f"run.dir: {config.run.dir!r} is a file or holds files that are no run; choose another "
            f"folder."
        )
    if not config.run.overwrite:
        raise UserError(
            f"run.dir: {config.run.dir!r} holds an earlier run; choose another folder, or replace "
            f"it with run.overwrite=true."
        )


def is_run(folder: Path) -> bool:
    """Whether a run has written all that is there, and nobody else."""
    made = folder / "config.yaml"
    own = made.is_file() and made.read_bytes().startswith(configs.HEADER.encode())
    return own and all(path.name in RUN_FILES for path in folder.iterdir())


def make_folder(config: Config, world: World) -> str:
    """The run folder, with the resolved config in it, instead of what an earlier run left there;
    returns the folder of the student that training starts from. Both are made beside it first:
    where the student cannot be cut, the earlier run is still there."""

    def make() -> str:
        check_folder(config)
        folder = Path(config.run.dir)
        new = folder.with_name(folder.name + ".partial")
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            configs.save(config, new / "config.yaml")
            student_path = starting_student(config, new) or str(folder / "student")
            folder.mkdir(exist_ok=True)
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            for made in new.iterdir():
                made.rename(folder / made.name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return student_path

    return on_first(world, user_errors(make))


def starting_student(config: Config, folder: Path) -> str | None:
    """The folder that is given; None where the student was cut out of the teacher, into
    `folder`/student."""
    student, trust = config.student, config.trust_remote_code
    if student.path is not None:
        return student.path
    task = tasks.load(config.task.kind)
    make_student(
        task.model_class, config.teacher.path, student.from_teacher, folder / "student", trust
    )
    return None


def source(config: Config) -> str:
    """The model that the student is, or is cut out of; the tokenizer is its."""
    return config.student.path or config.teacher.path


def prepared(config: Config, world: World, student_path: str) -> Run:
    """Task, tokenizer and tokenised data. The first process reads and checks; the others then find
    its cache. Writes nothing but that cache."""
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
        check_shapes_of_models(config, student_path)
        tokenizer, train, held_out = read()
        run = Run(config, world, task, tokenizer, train, held_out)
        if config.task.kind == "classification":
            check_classes(run, student_path)
        check_weights(run, student_path)

    on_first(world, user_errors(read_and_check))
    return Run(config, world, task, *read())


def check_shapes_of_models(config: Config, student_path: str) -> None:
    """Widths, layers and positions, of hub models too."""
    shapes: dict[str, Shape] = {}
    for key, path in (("teacher.path", config.teacher.path), ("student.path", student_path)):
        if path is None:
            continue
        found = read_config(path, config.trust_remote_code)
        refuse_type(key, found.model_type)
        shapes[key] = shape(found.to_dict())
        limit = getattr(found, "max_position_embeddings", None)
        if limit is not None and config.data.max_length > limit:
            raise UserError(
                f"data.max_length: {config.data.max_length} is more than the {limit} tokens "
                f"{path!r} takes; use {limit} or less."
            )
    check_shapes(config, shapes.get("teacher.path"), shapes["student.path"])


def check_weights(run: Run, student_path: str) -> None:
    """That the models' folders hold all weights, without reading them."""
    config, labels = run.config, class_count(run)
    models = {student_path: config.student}
    if config.teacher.path is not None:
        models[config.teacher.path] = config.teacher
    for path, settings in models.items():
        found = read_config(path, config.trust_remote_code)
        if labels is not None:
            found.num_labels = labels
        load_model(
            run.task.model_class,
            path,
            config=found,
            dtype="fp32",
            attention=settings.attention,
            new_head=labels is not None,
            trust_remote_code=config.trust_remote_code,
            weights=False,
        )


def class_count(run: Run) -> int | None:
    """Classes of a new head for a model that is trained on labels alone; None where it must have
    its head already."""
    if run.config.task.kind != "classification" or run.config.teacher.path is not None:
        return None
    return run.config.task.labels or max(run.train["labels"]) + 1


def check_classes(run: Run, student_path: str) -> None:
    """That models and labels speak of the same classes."""
    config = run.config
    student = read_config(student_path, config.trust_remote_code)
    teacher = (
        read_config(config.teacher.path, config.trust_remote_code) if config.teacher.path else None
    )
    if teacher is not None and teacher.num_labels != student.num_labels:
        raise UserError(
            f"teacher {config.teacher.path!r} has {teacher.num_labels} classes and student "
            f"{student_path!r} {student.num_labels}; use models of the same task, or "
            f"student.from_teacher."
        )
    if teacher is not None and config.task.labels not in (None, teacher.num_labels):
        raise UserError(
            f"task.labels: {config.task.labels} is not allowed; teacher {config.teacher.path!r} "
            f"has {teacher.num_labels} classes; remove it."
        )
    classes = class_count(run) or teacher.num_labels
    for name, rows in (("data.train", run.train), ("data.validation", run.held_out)):
        try:
            run.task.check_labels(rows["labels"], classes)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error


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
