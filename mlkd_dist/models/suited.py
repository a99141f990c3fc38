"""Whether a model suits the task, the tokenizer and the losses of a config, as far as it shows
without its weights."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mlkd_dist.config import Config, UserError
from mlkd_dist.layer_map import Pairs
from mlkd_dist.models.head import check_linear_head
from mlkd_dist.models.linears import layer_matrices, matrix_sizes, sizes
from mlkd_dist.models.roles import FAMILIES, NAMES
from mlkd_dist.models.tap import check_readable, first_position, layer_modules
from mlkd_dist.rules.schema import loss_schema


def check_model(config: Config, tokenizer: Any, path: str, model: PreTrainedModel) -> None:
    check_padding(config, tokenizer, path, model)
    check_positions(config, tokenizer, path, model)
    check_first_token(config, path, model)
    check_maps(config, path, model)


def looks_back(model: PreTrainedModel) -> bool:
    """Whether a token attends to those before it alone."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def check_padding(config: Config, tokenizer: Any, path: str, model: PreTrainedModel) -> None:
    """That texts can be padded, and that a decoder which answers at the last token of a text knows
    padding from it. causal_lm fills its rows by itself."""
    task, pad = config.task.kind, tokenizer.pad_token_id
    if task == "causal_lm":
        return
    if pad is None:
        raise UserError(
            f"the tokenizer of {path!r} has no padding token, which task.kind {task} needs; use a "
            f"copy of the model with a pad_token in tokenizer_config.json and its number as "
            f"pad_token_id in config.json."
        )
    known = model.config.get_text_config().pad_token_id
    if task in ("classification", "regression") and looks_back(model) and known != pad:
        raise UserError(
            f"model {path!r} finds the last token of a text by its padding token {known}, and the "
            f"tokenizer pads with {pad}; use a copy of it with pad_token_id {pad} in config.json."
        )


def check_first_token(config: Config, path: str, model: PreTrainedModel) -> None:
    """That nothing reads a text off the first token of a model in which that has seen itself
    alone."""
    readers = [
        f"stages[{index}].losses.{name}.of"
        for index, stage in enumerate(config.stages)
        for name, options in stage.losses.items()
        if options.get("of") == "cls"
    ]
    readers += ["task.pooling"] * (config.task.pooling == "cls")
    if readers and looks_back(model):
        raise UserError(
            f"{readers[0]}: cls is the first token, which in {path!r} sees nothing but itself "
            f"({type(model).__name__} is a decoder); use last or mean."
        )


def check_maps(config: Config, path: str, model: PreTrainedModel) -> None:
    """That a loss on attention maps would see the model's own: those that softmax makes of all
    scores of the tokens before, or of all tokens."""
    losses = [name for stage in config.stages for name in stage.losses]
    readers = [f"losses.{name}" for name in losses if loss_schema(name).same_heads]
    readers += ["run.compare_maps"] * config.run.compare_maps
    if not readers:
        return
    name, found = readers[0], model.config.get_text_config()
    if getattr(found, "attn_logit_softcapping", None):
        raise UserError(
            f"{name}: model {path!r} caps its attention scores, so its attention maps are not made "
            f"of queries and keys alone; leave it out, or use attention_relation."
        )
    if any(hasattr(part, "sinks") for part in model.modules()):
        raise UserError(
            f"{name}: in model {path!r} attention also goes to sinks, which are no tokens, so its "
            f"attention maps are not made of queries and keys alone; leave it out, or use "
            f"attention_relation."
        )
    # What `local_attention` counts lies half before a token and half behind it.
    both_ways = getattr(found, "local_attention", None) or 0
    windows = [getattr(found, "sliding_window", None), both_ways // 2]
    window = min((size for size in windows if size), default=None)
    if window is not None and config.data.max_length > window:
        raise UserError(
            f"data.max_length: {config.data.max_length} is more than the {window} tokens that "
            f"layers of {path!r} look back, and {name} compares whole attention maps; use {window} "
            f"or less, or attention_relation."
        )


def layer_of(model: PreTrainedModel, index: int) -> nn.Module:
    """ALBERT runs fewer layers more often."""
    layers = layer_modules(model)
    return layers[min(index, len(layers) - 1)]


def check_attends(
    where: str, pairs: Pairs, teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    """That these layers of both have attention that can be read."""
    for model, indices in zip((student, teacher), zip(*pairs, strict=True), strict=True):
        for index in indices:
            if not attends(layer_of(model, index)):
                raise UserError(
                    f"{where}: layer {index} of {type(model).__name__} has no attention to "
                    f"compare; give it layers that have, as in layers: [[student, teacher], ...]."
                )


def check_matrices(
    where: str,
    of: list[str] | None,
    pairs: Pairs,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
) -> None:
    """That these layers of both models have these matrices, of the same sizes; `of` None: all they
    have."""
    for ours, theirs in pairs:
        layers = (teacher, theirs), (student, ours)
        found = [matrix_sizes(layer_of(model, index)) for model, index in layers]
        known = found[0] | found[1] | matrix_sizes(layer_of(student, 0))
        for (model, index), there in zip(layers, found, strict=True):
            check_joined(where, of, model, layer_of(model, index))
            if not there:
                raise UserError(
                    f"{where}: the matrices of {type(model).__name__} are not known by name; use "
                    f"models like {FAMILIES}."
                )
            for role in of or known:
                if role not in there:
                    raise UserError(
                        f"{where}.of: {type(model).__name__} has no matrix {role} in layer "
                        f"{index}; all layers of both models must have what is compared, and this "
                        f"has {', '.join(there)}."
                    )
        for role in of or known:
            wide, narrow = (each[role] for each in found)
            if wide != narrow:
                raise UserError(
                    f"{where}: {role} maps {wide[0]} to {wide[1]} numbers in the "
                    f"teacher and {narrow[0]} to {narrow[1]} in the student; use a student "
                    f"with matrices of the same sizes (student.low_rank)."
                )


def check_joined(
    where: str, of: list[str] | None, model: PreTrainedModel, layer: nn.Module
) -> None:
    """That a matrix which joins queries, keys and values has as many of each."""
    for name, matrix in layer_matrices(layer).items():
        roles, (given, made) = NAMES[name], sizes(matrix)
        if len(roles) == 3 and made != 3 * given and set(of or roles) & set(roles):
            raise UserError(
                f"{where}.of: {type(model).__name__} joins queries with fewer keys and values in "
                f"{name}, which cannot be taken apart here; name other matrices in of."
            )


def check_kind(config: Config, task: Any, path: str, found: PreTrainedConfig) -> PreTrainedModel:
    """That transformers has this model for the task, and that it can be read; returns it without
    weights."""
    model_class = task.model_class
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
    if task.vocabulary:
        check_linear_head(model, path)
        check_direction(model, path, config)
    return model


def check_positions(config: Config, tokenizer: Any, path: str, model: PreTrainedModel) -> None:
    """That a model which counts positions from its padding token's number on, as RoBERTa does, has
    the tokenizer's padding token, and a place for the last token."""
    first = first_position(model)
    if first == 0:
        return
    pad, length = tokenizer.pad_token_id, config.data.max_length
    if first - 1 != pad:
        raise UserError(
            f"model {path!r} counts positions from its padding token {first - 1} on, and "
            f"the tokenizer pads with {pad}; use a model made for this tokenizer: pad_token_id in "
            f"its config.json must be {pad}."
        )
    limit = model.config.max_position_embeddings - first
    if length > limit:
        raise UserError(
            f"data.max_length: {length} is more than the {limit} tokens {path!r} takes, which "
            f"counts positions from {pad + 1} on; use {limit} or less."
        )


def check_direction(model: PreTrainedModel, path: str, config: Config) -> None:
    """That a model of causal_lm looks back only: an encoder would read the tokens it is to say."""
    if config.task.kind == "causal_lm" and not looks_back(model):
        raise UserError(
            f"model {path!r}: {type(model).__name__} attends to tokens that come later, so it "
            f"cannot learn to say them; use a decoder, or task.kind masked_lm."
        )
    if not config.data.pack:
        return
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"model {path!r}: {type(model).__name__} takes no position_ids, which count anew in "
            f"each document of a packed sequence; use data.pack=false."
        )
    for index, layer in enumerate(layer_modules(model)):
        if not keeps_apart(layer):
            raise UserError(
                f"model {path!r}: layer {index} of {type(model).__name__} has more than attention "
                f"by which a token learns of those before it, also of other documents in a packed "
                f"sequence; use data.pack=false."
            )


def keeps_apart(layer: nn.Module) -> bool:
    """Whether tokens meet in attention alone, whose mask knows documents: not in convolutions,
    which come with every state-space layer, nor in attention without a softmax."""
    return attends(layer) and not any(isinstance(part, nn.Conv1d) for part in layer.modules())


def attends(layer: nn.Module) -> bool:
    """Whether it has attention of the kind that transformers' attention functions compute."""
    return any(hasattr(part, "is_causal") for part in layer.modules())
