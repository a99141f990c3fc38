"""What config.json files tell of models, and what a config may ask of their layers, heads and
widths."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlkd_dist.config import (
    Config,
    FromTeacherConfig,
    StageConfig,
    UserError,
    resolve_path,
)
from mlkd_dist.layer_map import layer_pairs
from mlkd_dist.rules.schema import loss_schema

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Shape:
    """What config.json tells of a model."""

    type: str
    hidden: int
    layers: int
    heads: int
    attention: int  # heads times width of a head
    key: int  # key heads times width of a head
    vocabulary: int  # entries of the output head of a language model

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
        first("vocab_size"),
    )


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
    key = teacher.key * hidden // teacher.hidden
    return Shape(teacher.type, hidden, count, heads, width, key, teacher.vocabulary)


def check_shapes(config: Config, teacher: Shape | None, student: Shape | None) -> Shape | None:
    """The student to be cut, layer maps, heads and splits, where the models are known. Returns what
    the student will be."""
    if teacher is None or not teacher.known:
        return student
    if config.student.path is None:
        student = student_shape(config.student.from_teacher or FromTeacherConfig(), teacher)
    if student is not None and student.known:
        for index, stage in enumerate(config.stages):
            check_stage_on_models(f"stages[{index}]", stage, teacher, student)
            if config.task.kind in ("masked_lm", "causal_lm"):
                check_vocabularies(f"stages[{index}]", stage, teacher, student)
        check_top_k(config, teacher, student)
    return student


def check_top_k(config: Config, teacher: Shape, student: Shape) -> None:
    entries = min(teacher.vocabulary, student.vocabulary)
    top_k = config.teacher.cache.top_k if config.teacher.cache else None
    if top_k is not None and top_k > entries > 0:
        raise UserError(
            f"teacher.cache.top_k: {top_k} is more than the {entries} entries of the vocabulary; "
            f"use {entries} or less."
        )


def check_vocabularies(where: str, stage: StageConfig, teacher: Shape, student: Shape) -> None:
    """Heads of one tokenizer may be padded to different numbers of entries."""
    ours, theirs = student.vocabulary, teacher.vocabulary
    for name, options in stage.losses.items():
        if ours != theirs and options.get("truncate") is False:
            raise UserError(
                f"{where}.losses.{name}: the student's vocabulary has {ours} entries and the "
                f"teacher's {theirs}; where both have the same tokenizer and one is only padded, "
                f"compare the first {min(ours, theirs)} with {name}.truncate=true."
            )


def check_stage_on_models(where: str, stage: StageConfig, teacher: Shape, student: Shape) -> None:
    for name, options in stage.losses.items():
        key, schema = f"{where}.losses.{name}", loss_schema(name)
        if schema.in_pairs:
            own = options["layers"]
            place = where if own is None else key
            try:
                layer_pairs(stage.layers if own is None else own, student.layers, teacher.layers)
            except ValueError as error:
                raise UserError(f"{place}.{error}") from error
        if schema.scope == "module":
            check_modules(key, teacher, student)
        if schema.same_heads and student.heads != teacher.heads:
            raise UserError(
                f"{key}: it compares head with head, and the student has {student.heads} heads and "
                f"the teacher {teacher.heads}; use attention_relation, which cuts both anew, or a "
                f"student of {teacher.heads} heads."
            )
        if "splits" in options:
            check_splits(key, schema.read_by(options), options["splits"], teacher, student)


def check_modules(where: str, teacher: Shape, student: Shape) -> None:
    """What matrices give is compared number by number."""
    for what in ("hidden", "attention", "key"):
        ours, theirs = getattr(student, what), getattr(teacher, what)
        if ours != theirs:
            raise UserError(
                f"{where}: its modules are compared number by number, and the student's {what} "
                f"width is {ours}, the teacher's {theirs}; use a student as wide as its teacher "
                f"(student.low_rank, or from_teacher without hidden)."
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
