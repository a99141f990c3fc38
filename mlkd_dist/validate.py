"""Checks of a whole config that need no weights and no torch: allowed values, keys that exclude
each other, the options of every loss (read from its signature), and what the models' config files
say about widths and layers."""

import ast
import json
import math
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from mlkd_dist.config import (
    Config,
    FromTeacherConfig,
    StageConfig,
    TermConfig,
    UserError,
    nearest,
    resolve_path,
)
from mlkd_dist.layer_map import is_pairs, layer_pairs

LOSSES = Path(__file__).parent / "losses"
TASKS = Path(__file__).parent / "tasks"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
ATTENTION = ["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
# Options of one task only; set for another task they would be ignored.
TASK_OPTIONS = {"pooling": "embedding", "labels": "classification", "mask_probability": "masked_lm"}
ONE_TEXT = ["embedding", "masked_lm"]
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
    "amp": "student.dtype",
}
OWNED_ZERO = {"stage": "student.zero_stage", "offload_optimizer": "student.offload"}


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

    @property
    def known(self) -> bool:
        return min(self.hidden, self.layers, self.heads) > 0

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
    """Of a local folder; None for a hub name, whose config is looked at when the run starts."""
    folder = Path(resolve_path(path)).expanduser()
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or path.startswith((".", "runs/")):
            raise UserError(f"model {path!r}: no such folder; give a Hugging Face model folder.")
        if not HUB_NAME.fullmatch(path):
            raise UserError(
                f"model {path!r}: there is no such folder, and it is no hub name (owner/name)."
            )
        return None
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model {path!r}: the folder has no config.json; give a Hugging Face model folder."
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"model {path!r}: config.json is not JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(
            f"model {path!r}: config.json names no model_type; give a Hugging Face model folder."
        )
    return shape(config)


def shape(config: dict[str, Any]) -> Shape:
    """What is not said, or said by other names, is 0: such a model is looked at again when the run
    starts."""

    def first(*keys: str) -> int:
        return next((config[key] for key in keys if type(config.get(key)) is int), 0)

    hidden = first("hidden_size", "dim", "n_embd", "d_model")
    heads = first("num_attention_heads", "n_heads", "n_head")
    head_dim = first("head_dim") or hidden // max(heads, 1)
    return Shape(
        config["model_type"],
        hidden,
        first("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
        heads,
        heads * head_dim,
        (first("num_key_value_heads") or heads) * head_dim,
    )


def validate(config: Config) -> None:
    """Raises UserError; fills in the default of every option of every loss."""
    check_values(config)
    check_deepspeed(config.deepspeed)
    check_task(config)
    check_folders(config)
    stages = config.stages
    if not stages:
        raise UserError(
            "stages: give at least one stage, for example [{steps: 100, losses: {hidden_mse: {}}}]."
        )
    if len({stage.name for stage in stages}) < len(stages):
        raise UserError(
            f"stages: names must differ, given {[stage.name for stage in stages]}; rename one."
        )
    for index, stage in enumerate(stages):
        check_stage(f"stages[{index}]", stage, config.task.kind)
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


def above(key: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value > low):
        raise UserError(f"{key}: {value} is not allowed; it must be more than {low}.")


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
    above("optim.eps", config.optim.eps, 0)
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(
            f"optim.betas: {betas} is not allowed; give two numbers from 0 to below 1, as in "
            f"[0.9, 0.999]."
        )
    if config.data.pack:
        raise UserError("data.pack: true is not available for these tasks; use false.")


def check_deepspeed(extra: dict[str, Any]) -> None:
    for key, ours in OWNED.items():
        if key in extra:
            raise UserError(
                f"deepspeed.{key}: this is set by {ours}; remove it here and set it there."
            )
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(
            f"deepspeed.zero_optimization: {zero!r} is not allowed; give keys and values, and the "
            f"stage as student.zero_stage."
        )
    for key, ours in OWNED_ZERO.items():
        if key in zero:
            raise UserError(
                f"deepspeed.zero_optimization.{key}: this is set by {ours}; remove it here and "
                f"set it there."
            )


def check_folders(config: Config) -> None:
    """The run folder may be replaced, so nothing that the run needs lies in it."""
    if not config.run.dir.strip():
        raise UserError("run.dir: it is empty; give the folder that receives the run.")
    folder = Path(config.run.dir).expanduser().resolve()
    finetune = config.teacher.finetune
    read = {
        "teacher.path": config.teacher.path,
        "student.path": config.student.path,
        "data.train": config.data.train,
        "data.validation": config.data.validation,
    }
    written = {
        "data.cache": config.data.cache,
        "teacher.finetune.dir": finetune.dir if finetune else None,
    }
    for key, path in (read | written).items():
        if path is None or ":" in path:
            continue
        place = Path(path).expanduser().resolve()
        # What is not there may be a hub name.
        if place.is_relative_to(folder) and (key in written or place.exists()):
            raise UserError(
                f"{key}: {path!r} lies in run.dir ({config.run.dir!r}), which the run writes "
                f"anew; choose another run.dir."
            )
        if key == "teacher.finetune.dir" and folder.is_relative_to(place):
            raise UserError(
                f"run.dir: {config.run.dir!r} lies in teacher.finetune.dir ({path!r}), which the "
                f"fine-tuning writes anew; choose another run.dir."
            )


def check_task(config: Config) -> None:
    one_of("task.kind", config.task.kind, names(TASKS))
    for option, kind in TASK_OPTIONS.items():
        if getattr(config.task, option) is not None and config.task.kind != kind:
            raise UserError(
                f"task.{option}: only for task.kind {kind}, given with {config.task.kind}; remove "
                f"it."
            )
    if config.data.text_pair is not None and config.task.kind in ONE_TEXT:
        raise UserError(
            f"data.text_pair: the task {config.task.kind} reads one text per row; remove it."
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
            f"{key}: give either steps or epochs, "
            f"{'neither' if given.steps is None else 'both'} is given."
        )
    length = given.steps if given.epochs is None else given.epochs
    if not (math.isfinite(length) and length > 0):
        raise UserError(f"{key}: its length is {length}; it must be more than 0.")


def check_stage(where: str, stage: StageConfig, task: str) -> None:
    check_length(where, stage)
    if stage.lr is not None:
        at_least(f"{where}.lr", stage.lr, 0)
    check_layers(where, stage.layers)
    known = names(LOSSES)
    if not stage.losses:
        raise UserError(f"{where}.losses: none is given; give at least one of {', '.join(known)}.")
    for name, given in stage.losses.items():
        key = f"{where}.losses.{name}"
        if name not in known:
            raise UserError(
                f"{key}: no such loss{nearest(name, known)}; use one of {', '.join(known)}."
            )
        schema = loss_schema(name)
        if task == "embedding" and schema.rows == "label":
            raise UserError(
                f"{key}: this loss reads logits, and the embedding task has none; remove it or "
                f"choose another task.kind."
            )
        stage.losses[name] = loss_options(key, schema, given)


def check_layers(where: str, layers: Any) -> None:
    """Its form; which layers there are is known with the models."""
    if layers not in ("uniform", "last") and not is_pairs(layers):
        close = nearest(layers, ["uniform", "last"])
        raise UserError(
            f"{where}.layers: {layers!r} is not allowed{close}; use uniform, last, or pairs "
            f"[[student, teacher], ...] of layer numbers counted from 0."
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
                f"{where}.{key}: no such option{nearest(key, list(allowed))}; allowed here: "
                f"{', '.join(allowed)}."
            )
        annotation = allowed[key][0]
        if not isinstance(annotation, str):
            annotation = getattr(annotation, "__name__", "Any")
        if not fits(value, annotation):
            raise UserError(f"{where}.{key}: {value!r} is not allowed; give {told(annotation)}.")
    options = {
        key: list(d) if isinstance(d, tuple) else d for key, (_, d) in allowed.items()
    } | given
    check_option_values(where, schema, options)
    return options


def fits(value: Any, annotation: str) -> bool:
    """Whether a YAML value is of a type written as in a signature: float, int | None, list[str],
    Literal['a', 'b']."""
    if annotation.startswith("Literal"):
        return isinstance(value, str | int) and value in literals(annotation)
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


def literals(annotation: str) -> tuple[Any, ...]:
    return ast.literal_eval(f"({annotation.removeprefix('Literal')[1:-1]},)")


def told(annotation: str) -> str:
    """Such a type in words."""
    if annotation.startswith("Literal"):
        return f"one of {', '.join(map(str, literals(annotation)))}"
    return " or ".join(
        {
            "None": "null",
            "bool": "true or false",
            "str": "a name",
            "int": "a whole number",
            "float": "a finite number",
            "list[str]": "a list of names, as in [name]",
        }[part]
        for part in annotation.split(" | ")
    )


def check_option_values(where: str, schema: LossSchema, options: dict[str, Any]) -> None:
    for name in schema.read_by(options):
        one_of(f"{where}.of", name, list(schema.reads))
    for key, allowed in (
        ("average", ["sample", "token"]),
        ("sum_layers", ["sum", "mean"]),
        ("project", ["auto", "always"]),
    ):
        if key in options:
            one_of(f"{where}.{key}", options[key], allowed)
    for key in ("temperature", "student_scale", "teacher_scale"):
        if options.get(key) is not None:
            above(f"{where}.{key}", options[key], 0)
    if options.get("splits") is not None:
        at_least(f"{where}.splits", options["splits"], 1)
    smoothing = options.get("label_smoothing", 0)
    if not 0 <= smoothing < 1:
        raise UserError(
            f"{where}.label_smoothing: {smoothing} is not allowed; it must be 0 or more and below "
            f"1."
        )
    if options.get("layers") is not None:
        check_layers(where, options["layers"])
    at_least(f"{where}.weight", options["weight"], 0)


def check_models(config: Config) -> None:
    if (config.student.path is None) == (config.student.from_teacher is None):
        raise UserError(
            f"student: give either path or from_teacher, "
            f"{'neither' if config.student.path is None else 'both'} is given."
        )
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
    check_shapes(config, teacher, student)


def check_shapes(config: Config, teacher: Shape | None, student: Shape | None) -> None:
    """The student to be cut, layer maps and splits, where the models are known."""
    if teacher is None or not teacher.known:
        return
    if config.student.from_teacher is not None:
        student = student_shape(config.student.from_teacher, teacher)
    if student is not None and student.known:
        for index, stage in enumerate(config.stages):
            check_stage_on_models(f"stages[{index}]", stage, teacher, student)


def refuse_type(key: str, model_type: str) -> None:
    if model_type in ("deberta", "deberta-v2", "mpnet"):
        raise UserError(
            f"{key}: models of the type {model_type!r} compute attention in their own code and "
            f"not through "
            "transformers' attention interface, so nothing inside them can be read; use a BERT, "
            "RoBERTa, ELECTRA, "
            "ModernBERT, Llama or another model that supports it."
        )


def student_shape(cut: FromTeacherConfig, teacher: Shape) -> Shape:
    """Shape of the student that from_teacher asks for; raises where there is no such student."""
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
    hidden = teacher.hidden if cut.hidden is None else cut.hidden
    if not 1 <= hidden <= teacher.hidden:
        raise UserError(
            f"{key}.hidden: {hidden} is not allowed; it must be 1 to the teacher's "
            f"{teacher.hidden}."
        )
    heads = teacher.heads if cut.heads is None else cut.heads
    width = teacher.attention * hidden // teacher.hidden
    if heads < 1 or width % heads:
        raise UserError(
            f"{key}.heads: {heads} is not allowed; it must divide the attention width of the "
            f"student, {width}."
        )
    return Shape(teacher.type, hidden, count, heads, width, teacher.key * hidden // teacher.hidden)


def check_stage_on_models(where: str, stage: StageConfig, teacher: Shape, student: Shape) -> None:
    for name, options in stage.losses.items():
        key, schema = f"{where}.losses.{name}", loss_schema(name)
        if schema.scope == "layer":
            own = options["layers"]
            place = where if own is None else key
            try:
                layer_pairs(stage.layers if own is None else own, student.layers, teacher.layers)
            except ValueError as error:
                raise UserError(f"{place}.{error}") from error
        if "splits" in options:
            check_splits(key, schema.read_by(options), options["splits"], teacher, student)


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
