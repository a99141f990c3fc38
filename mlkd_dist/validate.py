"""Checks of a whole config that need no weights and no torch: allowed values, keys that exclude
each other, the options of every loss (read from its signature), and what the models' config files
say about widths and layers."""

import ast
import json
import math
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from mlkd_dist.config import Config, StageConfig, TermConfig, UserError, nearest, resolve_path
from mlkd_dist.layer_map import layer_pairs

LOSSES = Path(__file__).parent / "losses"
TASKS = Path(__file__).parent / "tasks"
ATTENTION = ["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
# Options of one task only; set for another task they would be ignored.
TASK_OPTIONS = {"pooling": "embedding", "labels": "classification", "mask_probability": "masked_lm"}
# DeepSpeed keys that other keys of the config already decide.
OWNED = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.grad_accum",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "student.dtype",
    "fp16": "student.dtype",
    "activation_checkpointing": "student.activation_checkpointing",
}


@dataclass(frozen=True)
class LossSchema:
    """What the file of a loss says about it; see mlkd_dist/losses/__init__.py."""

    rows: str
    scope: str
    reads: tuple[str, ...]
    teacher: bool
    projection: bool
    options: dict[str, tuple[str, Any]]  # name -> (annotation, default)

    def common(self) -> list[str]:
        """The options of TermConfig that mean something for this loss."""
        names = ["weight"]
        names += ["layers", "sum_layers"] if self.scope == "layer" else []
        names += ["average"] if self.rows == "token" else []
        names += ["project"] if self.projection else []
        names += ["shared_projection"] if self.projection and self.scope == "layer" else []
        return names

    def read_by(self, options: dict[str, Any]) -> tuple[str, ...]:
        """What this loss reads of a trace under these options."""
        of = options.get("of", self.reads)
        return (of,) if isinstance(of, str) else tuple(of)


@dataclass(frozen=True)
class Shape:
    """What config.json tells of a model."""

    type: str
    hidden: int
    layers: int
    heads: int
    attention: int  # heads times width of a head
    key: int  # key heads times width of a head

    def width(self, read: str) -> int:
        """Of what a loss reads in a layer."""
        return {
            "query": self.attention,
            "context": self.attention,
            "key": self.key,
            "value": self.key,
        }.get(read, self.hidden)


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


@cache
def loss_schema(name: str) -> LossSchema:
    """Read without importing: losses import torch, and a config must be refused in a second."""
    tree = ast.parse((LOSSES / f"{name}.py").read_text())
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.isupper()
    }
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    options = {
        arg.arg: (ast.unparse(arg.annotation), ast.literal_eval(default))
        for arg, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        if arg.arg != "backend"
    }
    known = {
        key: constants[key.upper()] for key in ("rows", "scope", "reads", "teacher", "projection")
    }
    return LossSchema(options=options, **known)


def model_shape(path: str) -> Shape | None:
    """Of a local folder; None for a hub name, whose config is looked at later."""
    folder = Path(resolve_path(path))
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "runs/")) or path.count("/") > 1:
            raise UserError(f"model {path!r}: no such folder.")
        return None
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model {path!r}: the folder has no config.json; give a Hugging Face model folder."
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"model {path!r}: config.json is not JSON: {error}.") from error

    def first(*keys: str) -> int:
        return next((config[key] for key in keys if isinstance(config.get(key), int)), 0)

    hidden = first("hidden_size", "dim", "n_embd", "d_model")
    heads = first("num_attention_heads", "n_heads", "n_head")
    return shape(
        str(config.get("model_type")),
        hidden,
        first("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
        heads,
        first("num_key_value_heads") or heads,
        first("head_dim") or hidden // max(heads, 1),
    )


def shape(
    model_type: str, hidden: int, layers: int, heads: int, key_heads: int, head_dim: int
) -> Shape:
    return Shape(model_type, hidden, layers, heads, heads * head_dim, key_heads * head_dim)


def validate(config: Config) -> None:
    """Raises UserError; fills in the default of every option of every loss."""
    check_values(config)
    check_deepspeed(config.deepspeed)
    check_task(config)
    stages = config.stages
    if not stages:
        raise UserError(
            "stages: give at least one stage, for example [{steps: 100, losses: {hidden_mse: {}}}]."
        )
    if len({stage.name for stage in stages}) < len(stages):
        raise UserError(f"stages: names must differ, given {[stage.name for stage in stages]}.")
    for stage in stages:
        check_stage(stage, config.task.kind)
    check_models(config)


def one_of(key: str, value: Any, allowed: list[Any]) -> None:
    if value not in allowed:
        listed = ", ".join(str(a) for a in allowed)
        raise UserError(
            f"{key}: {value!r} is not allowed{nearest(value, [str(a) for a in allowed])}; use "
            f"{listed}."
        )


def at_least(key: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value >= low):
        raise UserError(f"{key}: {value} is not allowed; it must be {low} or more.")


def share(key: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{key}: {value} is not allowed; it must lie between 0 and 1.")


def check_values(config: Config) -> None:
    for who, model in (("teacher", config.teacher), ("student", config.student)):
        one_of(f"{who}.dtype", model.dtype, ["fp32", "bf16"])
        one_of(f"{who}.offload", model.offload, ["none", "cpu"])
        one_of(f"{who}.attention", model.attention, ATTENTION)
    if config.teacher.zero_stage not in (0, 3):
        raise UserError(
            f"teacher.zero_stage: {config.teacher.zero_stage} is not allowed; a frozen teacher "
            f"has no optimizer and no "
            "gradients to shard, so use 0 (whole on every process) or 3 (weights sharded)."
        )
    one_of("student.zero_stage", config.student.zero_stage, [0, 1, 2, 3])
    for who, model in (("teacher", config.teacher), ("student", config.student)):
        if model.offload == "cpu" and model.zero_stage == 0:
            raise UserError(
                f"{who}.offload: cpu needs sharding; set {who}.zero_stage=3 or {who}.offload=none."
            )
    if config.student.activation_checkpointing == "reentrant":
        raise UserError(
            "student.activation_checkpointing: reentrant checkpointing drops the gradient of "
            "every loss on inner "
            "layers without a word; use non_reentrant or none."
        )
    one_of(
        "student.activation_checkpointing",
        config.student.activation_checkpointing,
        ["none", "non_reentrant"],
    )
    one_of("optim.schedule", config.optim.schedule, ["linear", "cosine", "constant"])
    one_of("kernels", config.kernels, ["auto", "triton", "streamed", "eager"])
    for key, value, low in (
        ("launch.processes", config.launch.processes, 1),
        ("batch.micro_batch", config.batch.micro_batch, 1),
        ("batch.grad_accum", config.batch.grad_accum, 1),
        ("batch.evaluation", config.batch.evaluation, 1),
        ("log_every", config.log_every, 1),
        ("run.seed", config.run.seed, 0),
        ("optim.lr", config.optim.lr, 0),
        ("optim.warmup", config.optim.warmup, 0),
        ("optim.weight_decay", config.optim.weight_decay, 0),
        ("optim.grad_clip", config.optim.grad_clip, 0),
        ("data.max_length", config.data.max_length, 4),
        ("data.workers", config.data.workers, 0),
    ):
        at_least(key, value, low)
    share("data.validation_fraction", config.data.validation_fraction)
    if len(config.optim.betas) != 2:
        raise UserError(f"optim.betas: two numbers are needed, given {config.optim.betas}.")
    if config.data.pack:
        raise UserError("data.pack: true is not available for these tasks; use false.")


def check_deepspeed(extra: dict[str, Any]) -> None:
    for key, ours in OWNED.items():
        if key in extra:
            raise UserError(
                f"deepspeed.{key}: this is set by {ours}; remove it here and set it there."
            )
    if "stage" in (extra.get("zero_optimization") or {}):
        raise UserError(
            "deepspeed.zero_optimization.stage: this is set by student.zero_stage; set it there."
        )


def check_task(config: Config) -> None:
    one_of("task.kind", config.task.kind, names(TASKS))
    for option, kind in TASK_OPTIONS.items():
        if getattr(config.task, option) is not None and config.task.kind != kind:
            raise UserError(
                f"task.{option}: only for task.kind {kind}, given with {config.task.kind}; remove "
                f"it."
            )
    if config.task.pooling is not None:
        one_of("task.pooling", config.task.pooling, ["mean", "cls", "last"])
    if config.task.mask_probability is not None:
        share("task.mask_probability", config.task.mask_probability)
    if config.task.labels is not None:
        at_least("task.labels", config.task.labels, 2)
    finetune = config.teacher.finetune
    if finetune is not None:
        if config.task.kind == "embedding":
            raise UserError(
                "teacher.finetune: the embedding task has no labels to train on; remove it."
            )
        check_length("teacher.finetune", finetune)
        at_least("teacher.finetune.lr", finetune.lr, 0)


def check_length(key: str, given: Any) -> None:
    if (given.steps is None) == (given.epochs is None):
        raise UserError(
            f"{key}: give either steps or epochs, {'both' if given.steps else 'neither'} is given."
        )
    length = given.steps if given.epochs is None else given.epochs
    if not (math.isfinite(length) and length > 0):
        raise UserError(f"{key}: its length is {length}; it must be more than 0.")


def check_stage(stage: StageConfig, task: str) -> None:
    where = f"stage {stage.name!r}"
    check_length(where, stage)
    if stage.lr is not None:
        at_least(f"{where}: lr", stage.lr, 0)
    if not stage.losses:
        raise UserError(f"{where}: losses: give at least one of {', '.join(names(LOSSES))}.")
    for name, given in stage.losses.items():
        if name not in names(LOSSES):
            known = names(LOSSES)
            raise UserError(
                f"{where}: no loss {name!r}{nearest(name, known)}; use {', '.join(known)}."
            )
        stage.losses[name] = loss_options(f"{where}: losses.{name}", loss_schema(name), given)
        if task == "embedding" and loss_schema(name).rows == "label":
            raise UserError(
                f"{where}: {name} reads logits, and the embedding task has none; remove it."
            )


def loss_options(where: str, schema: LossSchema, given: Any) -> dict[str, Any]:
    """The options as given, over their defaults."""
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise UserError(f"{where}: options are given as {{key: value}}, not {given!r}.")
    common = {f.name: (f.type, f.default) for f in fields(TermConfig) if f.name in schema.common()}
    allowed = common | schema.options
    for key, value in given.items():
        if key not in allowed:
            raise UserError(
                f"{where}: no option {key!r}{nearest(key, list(allowed))}; allowed here: "
                f"{', '.join(allowed)}."
            )
        annotation = allowed[key][0]
        annotation = (
            annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "Any")
        )
        if not fits(value, annotation):
            raise UserError(f"{where}.{key}: {value!r} is not of the type {annotation}.")
    options = {
        key: list(d) if isinstance(d, tuple) else d for key, (_, d) in allowed.items()
    } | given
    check_option_values(where, schema, options)
    return options


def fits(value: Any, annotation: str) -> bool:
    """Whether a YAML value is of a type written as in a signature: float, int | None, list[str],
    Literal['a', 'b']."""
    if annotation.startswith("Literal"):
        return value in ast.literal_eval(f"({annotation.removeprefix('Literal')[1:-1]},)")
    if " | " in annotation:
        return any(fits(value, part) for part in annotation.split(" | "))
    match annotation:
        case "Any":
            return True
        case "None":
            return value is None
        case "bool" | "str":
            return type(value).__name__ == annotation
        case "int":
            return type(value) is int
        case "float":
            return type(value) in (int, float) and math.isfinite(value)
        case "list[str]":
            return (
                isinstance(value, list)
                and len(value) > 0
                and all(isinstance(v, str) for v in value)
            )
    raise AssertionError(annotation)


def check_option_values(where: str, schema: LossSchema, options: dict[str, Any]) -> None:
    for name in schema.read_by(options):
        one_of(f"{where}.of", name, list(schema.reads))
    if "average" in options:
        one_of(f"{where}.average", options["average"], ["sample", "token"])
    if "sum_layers" in options:
        one_of(f"{where}.sum_layers", options["sum_layers"], ["sum", "mean"])
    if "project" in options:
        one_of(f"{where}.project", options["project"], ["auto", "always"])
    if options.get("temperature") is not None and options["temperature"] <= 0:
        raise UserError(
            f"{where}.temperature: {options['temperature']} is not allowed; it must be more than 0."
        )
    if options.get("splits") is not None and options["splits"] < 1:
        raise UserError(
            f"{where}.splits: {options['splits']} is not allowed; it must be 1 or more."
        )
    at_least(f"{where}.weight", options["weight"], 0)


def check_models(config: Config) -> None:
    if (config.student.path is None) == (config.student.from_teacher is None):
        raise UserError("student: give either path or from_teacher, exactly one of them.")
    needed = config.student.from_teacher is not None or any(
        loss_schema(name).teacher for stage in config.stages for name in stage.losses
    )
    if needed and config.teacher.path is None:
        raise UserError(
            "teacher.path: this run learns from a teacher; give a folder, package:NAME/path or "
            "hub name."
        )
    teacher = model_shape(config.teacher.path) if config.teacher.path else None
    student = model_shape(config.student.path) if config.student.path else None
    for key, shape in (("teacher.path", teacher), ("student.path", student)):
        if shape is not None:
            refuse_type(key, shape.type)
    if config.student.from_teacher is not None and teacher is not None:
        student = student_shape(config, teacher)
    if teacher is not None and student is not None:
        for stage in config.stages:
            check_stage_on_models(stage, teacher, student)


def refuse_type(key: str, model_type: str) -> None:
    if model_type in ("deberta", "deberta-v2", "mpnet"):
        raise UserError(
            f"{key}: models of the type {model_type!r} compute attention in their own code and "
            f"not through "
            "transformers' attention interface, so nothing inside them can be read; use a BERT, "
            "RoBERTa, ELECTRA, "
            "ModernBERT, Llama or another model that supports it."
        )


def student_shape(config: Config, teacher: Shape) -> Shape:
    """Shape of the student that from_teacher asks for; raises where there is no such student."""
    cut = config.student.from_teacher
    layers = cut.layers if cut.layers is not None else teacher.layers
    key = "student.from_teacher"
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= teacher.layers:
            raise UserError(
                f"{key}.layers: {layers} is not allowed; the teacher has {teacher.layers} layers."
            )
        count = layers
    elif (
        isinstance(layers, list)
        and layers
        and all(type(i) is int and 0 <= i < teacher.layers for i in layers)
    ):
        count = len(layers)
    else:
        raise UserError(
            f"{key}.layers: {layers!r} is not allowed; give a number of layers, or a list of the "
            f"teacher's layers "
            f"0 to {teacher.layers - 1}."
        )
    hidden = cut.hidden or teacher.hidden
    if not 1 <= hidden <= teacher.hidden:
        raise UserError(
            f"{key}.hidden: {hidden} is not allowed; it must be 1 to the teacher's "
            f"{teacher.hidden}."
        )
    heads = cut.heads or teacher.heads
    width = teacher.attention * hidden // teacher.hidden
    if heads < 1 or width % heads:
        raise UserError(
            f"{key}.heads: {heads} is not allowed; it must divide the attention width {width}."
        )
    return Shape(teacher.type, hidden, count, heads, width, teacher.key * hidden // teacher.hidden)


def check_stage_on_models(stage: StageConfig, teacher: Shape, student: Shape) -> None:
    for name, options in stage.losses.items():
        where = f"stage {stage.name!r}: losses.{name}"
        if loss_schema(name).scope == "layer":
            try:
                layer_pairs(options["layers"] or stage.layers, student.layers, teacher.layers)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
        if "splits" in options:
            check_splits(
                where, loss_schema(name).read_by(options), options["splits"], teacher, student
            )


def check_splits(
    where: str, reads: tuple[str, ...], splits: int | None, teacher: Shape, student: Shape
) -> None:
    """Relation losses cut both models' vectors into as many equal blocks; by default as many as the
    student's heads."""
    for read in reads:
        ours, theirs = student.width(read), teacher.width(read)
        given = student.heads if splits is None else splits
        if ours % given or theirs % given:
            source = "the student's heads" if splits is None else "given"
            raise UserError(
                f"{where}.splits: {given} ({source}) must divide the width of {read} in both "
                f"models, {ours} in the "
                f"student and {theirs} in the teacher; use a divisor of {math.gcd(ours, theirs)}."
            )
