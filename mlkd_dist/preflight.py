"""All that is checked before any weights load and before anything is written."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from mlkd_dist import tasks
from mlkd_dist.config import Config, UserError
from mlkd_dist.data import prepare
from mlkd_dist.engine import World, check_deepspeed
from mlkd_dist.finetune import with_finetuned_teacher
from mlkd_dist.model import load_model, read_config, read_tokenizer, refuse_other_tokenizer
from mlkd_dist.run import Run, class_count, on_first, standing, user_errors
from mlkd_dist.shapes import Shape, check_shapes, refuse_type, shape
from mlkd_dist.sources import read as read_source
from mlkd_dist.trace import check_readable
from mlkd_kernels import choose


def check_start(config: Config, world: World) -> str:
    """What is refused before anything is trained or written, a teacher to fine-tune included;
    returns what the run folder holds."""

    def check() -> str:
        found = standing(with_finetuned_teacher(config))
        try:
            choose(config.kernels)
        except ValueError as error:
            raise UserError(f"kernels: {error}") from error
        check_attention(config)
        check_deepspeed(config)
        if config.teacher.path is not None and config.student.path is not None:
            paths = config.teacher.path, config.student.path
            tokenizers = [read_tokenizer(path, config.trust_remote_code) for path in paths]
            refuse_other_tokenizer(*tokenizers, *paths)
        return found

    return on_first(world, user_errors(check))


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
        check_kind(config, run.task.model_class, path, found)
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


def check_kind(config: Config, model_class: Any, path: str, found: PreTrainedConfig) -> None:
    """That transformers has this model for the task, and that it can be read."""
    try:
        with torch.device("meta"):
            model = model_class.from_config(
                found, attn_implementation="eager", trust_remote_code=config.trust_remote_code
            )
    except ValueError as error:
        raise UserError(
            f"model {path!r}: transformers has no {model_class.__name__} of the type "
            f"{found.model_type!r}, which task.kind {config.task.kind} needs; use another model."
        ) from error
    check_readable(model, path)


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
    try:
        for rows in (run.train, run.held_out):
            run.task.check_labels(rows.unique("labels"), classes)
    except ValueError:
        refuse_labels(run, classes)


def refuse_labels(run: Run, classes: int) -> None:
    """UserError that names the row in its source, of which the run's rows may be a part."""
    data, task = run.config.data, run.task
    for key, place in (("data.train", data.train), ("data.validation", data.validation)):
        if place is None:
            continue
        try:
            task.check_labels(read_source(place, task.columns, task.label)[task.label], classes)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from error
