"""All that is checked before any weights load and before anything is written."""

from dataclasses import replace
from typing import Any

from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from mlkd_dist import tasks
from mlkd_dist.config import Config, UserError
from mlkd_dist.data import prepare
from mlkd_dist.engine import check_deepspeed, check_types
from mlkd_dist.finetune import with_finetuned_teacher
from mlkd_dist.inputs.batches import Sampler
from mlkd_dist.inputs.quarantine import Quarantine
from mlkd_dist.layer_map import layer_pairs
from mlkd_dist.low_rank import check_plan
from mlkd_dist.models.model import (
    give_all,
    load_model,
    read_config,
    read_tokenizer,
    refuse_other_tokenizer,
)
from mlkd_dist.models.nodes import shard_group
from mlkd_dist.models.suited import check_attends, check_kind, check_matrices, check_model
from mlkd_dist.processes.world import World
from mlkd_dist.rules.prompts import check_answers_fit
from mlkd_dist.rules.schema import loss_schema
from mlkd_dist.rules.shapes import Shape, check_shapes, refuse_type, shape
from mlkd_dist.run import Run, class_count, headless_student, on_first, standing, user_errors
from mlkd_dist.schedule import opening, total_steps
from mlkd_dist.student import starting_config
from mlkd_dist.trace import ATTENTION_READS
from mlkd_dist.watching.validation import undecided
from mlkd_kernels import choose


def check_start(config: Config, world: World) -> str:
    """What is refused before anything is trained or written, a teacher to fine-tune included;
    returns what the run folder holds."""
    shard_group(config.teacher.shard_group, world)

    def check() -> str:
        found = standing(with_finetuned_teacher(config))
        check_machine(config)
        return found

    return on_first(world, user_errors(check))


def check_machine(config: Config) -> None:
    """That what the config asks for is here, and that both models read the same tokens."""
    try:
        choose(config.kernels)
    except ValueError as error:
        raise UserError(f"kernels: {error}") from error
    check_attention(config)
    check_types(config)
    check_deepspeed(config)
    if config.teacher.path is not None and config.student.path is not None:
        paths = config.teacher.path, config.student.path
        tokenizers = [read_tokenizer(path, config.trust_remote_code) for path in paths]
        refuse_other_tokenizer(*tokenizers, *paths)


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

    def read() -> Run:
        tokenizer = read_tokenizer(student_path, config.trust_remote_code)
        if config.teacher.path is not None:
            give_all(tokenizer, read_tokenizer(config.teacher.path, config.trust_remote_code))
        task, data = read_task(config), config.data
        quarantine = Quarantine(data.max_bad)
        train, held_out = prepare(
            data.train,
            data.validation,
            data.validation_fraction,
            task,
            tokenizer,
            data.max_length,
            data.cache,
            data.train_rows,
            quarantine,
        )
        return Run(config, world, task, tokenizer, train, held_out, quarantine)

    def read_and_check() -> None:
        shapes = check_shapes_of_models(config, student_path)
        check_low_rank(config, tasks.load(config.task.kind))
        run = read()
        check_openings(config, world, len(run.train), *shapes)
        check_head(run)
        if config.task.kind == "classification":
            check_classes(run, student_path)
        check_entries(run, student_path)
        if config.task.kind == "regression":
            check_one_output(run, student_path)
        check_weights(run, student_path)
        check_held_out(run)

    on_first(world, user_errors(read_and_check))
    return read()


def check_held_out(run: Run) -> None:
    """That the held-out rows can tell one student from another, where they are to."""
    kind, every = run.config.task.kind, run.config.run.evaluate_every
    if every is not None and (lacking := undecided(kind, run.held_out)):
        raise UserError(
            f"run.evaluate_every: {every} is given, but {lacking}; name others as data.validation, "
            f"or remove it."
        )


def read_task(config: Config) -> Any:
    """The task, which knows how many classes labels may be of where a model says it."""
    settings = config.task
    if settings.kind == "classification" and config.teacher.path is not None:
        teacher = read_config(config.teacher.path, config.trust_remote_code)
        settings = replace(settings, labels=teacher.num_labels)
    return tasks.load(settings.kind)(settings, config.data)


def check_shapes_of_models(config: Config, student_path: str) -> tuple[Shape | None, Shape | None]:
    """Widths, layers and positions, of hub models too; returns the shapes of
    teacher and student."""
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
        if limit is not None:
            check_answers_fit(config, path, limit)
    teacher = shapes.get("teacher.path")
    return teacher, check_shapes(config, teacher, shapes["student.path"])


def check_openings(
    config: Config, world: World, rows: int, teacher: Shape | None, student: Shape | None
) -> None:
    """That a stage which opens layer after layer has a step for each."""
    if teacher is None or student is None or not (teacher.known and student.known):
        return
    batch = config.batch
    sampler = Sampler(rows, batch.micro_batch, batch.grad_accum, 0, world.size, seed=0)
    for index, stage in enumerate(config.stages):
        layers = {
            ours
            for name, options in stage.losses.items()
            if loss_schema(name).in_pairs
            for ours, _ in layer_pairs(
                options["layers"] or stage.layers, student.layers, teacher.layers
            )
        }
        steps = total_steps(stage, sampler.steps_per_epoch)
        opening(f"stages[{index}]", stage, sorted(layers), steps)


def check_low_rank(config: Config, task: Any) -> None:
    """That the student has the matrices which are to be factorised, and that each has a rank."""
    if config.student.low_rank is None:
        return
    model = check_kind(config, task, config.teacher.path, starting_config(config))
    check_plan(model, config.student.low_rank)


def check_weights(run: Run, student_path: str) -> None:
    """That the models' folders hold all weights, without reading them, and that the losses find the
    matrices that they read."""
    config, labels = run.config, class_count(run)
    models = {student_path: config.student}
    if config.teacher.path is not None:
        models[config.teacher.path] = config.teacher
    loaded = {}
    for path, settings in models.items():
        found = read_config(path, config.trust_remote_code)
        if labels is not None:
            found.num_labels = labels
        check_model(config, run.tokenizer, path, check_kind(config, run.task, path, found))
        loaded[path] = load_model(
            run.task.model_class,
            path,
            config=found,
            dtype="fp32",
            attention=settings.attention,
            new_head=labels is not None and path == student_path,
            trust_remote_code=config.trust_remote_code,
            weights=False,
        )
    for index, stage in enumerate(config.stages):
        for name, options in stage.losses.items():
            schema, where = loss_schema(name), f"stages[{index}].losses.{name}"
            if not schema.in_pairs:
                continue
            models = loaded[config.teacher.path], loaded[student_path]
            student, teacher = (model.config.num_hidden_layers for model in reversed(models))
            pairs = layer_pairs(options["layers"] or stage.layers, student, teacher)
            if schema.scope == "module":
                check_matrices(where, options["of"], pairs, *models)
            elif set(schema.reads) & set(ATTENTION_READS):
                check_attends(where, pairs, *models)


def check_entries(run: Run, student_path: str) -> None:
    """That every token of the tokenizer has an entry in both models' vocabularies."""
    tokens = max(run.tokenizer.get_vocab().values()) + 1
    for path in (student_path, run.config.teacher.path):
        if path is None:
            continue
        entries = read_config(path, run.config.trust_remote_code).get_text_config().vocab_size
        if tokens > entries:
            raise UserError(
                f"model {path!r} has {entries} entries in its vocabulary and the tokenizer of "
                f"{student_path!r} has {tokens} tokens; use a model whose embeddings were resized "
                f"to its tokenizer."
            )


def check_head(run: Run) -> None:
    """That a student without the task's head gets one that is trained."""
    config = run.config
    trains = any(loss_schema(name).rows == "label" for s in config.stages for name in s.losses)
    if headless_student(run) and class_count(run) is not None and not trains:
        raise UserError(
            f"student.path: {config.student.path!r} has no head for the task {config.task.kind}, "
            f"and no stage trains one; add the loss soft_labels or hard_labels, or use a model "
            f"with a head."
        )


def check_one_output(run: Run, student_path: str) -> None:
    """That the models say one number each."""
    config = run.config
    if class_count(run) is not None:
        student_path = None
    for path in filter(None, (config.teacher.path, student_path)):
        found = read_config(path, config.trust_remote_code)
        if found.num_labels != 1:
            raise UserError(
                f"model {path!r} has {found.num_labels} classes, and task.kind regression needs "
                f"one output; use a model trained for it, or make one with teacher.finetune."
            )


def check_classes(run: Run, student_path: str) -> None:
    """That the models speak of the same classes."""
    config = run.config
    student = read_config(student_path, config.trust_remote_code)
    teacher = (
        read_config(config.teacher.path, config.trust_remote_code) if config.teacher.path else None
    )
    learns = any("hard_labels" in stage.losses for stage in config.stages)
    if learns and max(run.train.unique("labels")) < 0:
        raise UserError(
            f"data.train: no label of {config.data.train!r} is known, all are -1, and hard_labels "
            f"needs some; use data with labels, or leave out the loss."
        )
    ours = class_count(run) or student.num_labels
    if teacher is not None and teacher.num_labels != ours:
        raise UserError(
            f"teacher {config.teacher.path!r} has {teacher.num_labels} classes and student "
            f"{student_path!r} {ours}; use models of the same task, or "
            f"student.from_teacher."
        )
    if teacher is not None and config.task.labels not in (None, teacher.num_labels):
        raise UserError(
            f"task.labels: {config.task.labels} is not allowed; teacher {config.teacher.path!r} "
            f"has {teacher.num_labels} classes; remove it."
        )
    classes = run.held_out.unique("labels")
    if teacher is None and max(classes) >= ours:
        raise UserError(
            f"label {max(classes)} of the validation rows is in no training row, and the model has "
            f"{ours} classes (0 to {ours - 1}); set task.labels to the number of classes."
        )
