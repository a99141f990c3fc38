"""Whether a model suits the task, the tokenizer and the losses of a config, as far as it shows
without its weights."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mlkd_dist.config import Config, UserError
from mlkd_dist.models.head import check_linear_head
from mlkd_dist.models.linears import matrix_sizes
from mlkd_dist.models.roles import FAMILIES
from mlkd_dist.models.tap import check_readable, layer_modules


def check_model(config: Config, tokenizer: Any, path: str, model: PreTrainedModel) -> None:
    check_padding(config, tokenizer, path, model)
    check_positions(config, tokenizer, path, model)
    check_first_token(config, path, model)


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


def check_matrices(
    where: str, of: list[str] | None, teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    """That both models have these matrices, of the same sizes; `of` None: all they have."""
    theirs, ours = (matrix_sizes(layer_modules(model)[0]) for model in (teacher, student))
    for model, found in ((teacher, theirs), (student, ours)):
        if not found:
            raise UserError(
                f"{where}: the matrices of {type(model).__name__} are not known by name; use "
                f"models like {FAMILIES}."
            )
        for role in of or theirs | ours:
            if role not in found:
                raise UserError(
                    f"{where}.of: {type(model).__name__} has no matrix {role}; both models must "
                    f"have what is compared, and it has {', '.join(found)}."
                )
    for role in of or theirs:
        if theirs[role] != ours[role]:
            raise UserError(
                f"{where}: {role} maps {theirs[role][0]} to {theirs[role][1]} numbers in the "
                f"teacher and {ours[role][0]} to {ours[role][1]} in the student; use a student "
                f"with matrices of the same sizes (student.low_rank)."
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
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    table = next((m for m in tables if getattr(m, "padding_idx", None) is not None), None)
    if table is None:
        return
    pad, length = tokenizer.pad_token_id, config.data.max_length
    if table.padding_idx != pad:
        raise UserError(
            f"model {path!r} counts positions from its padding token {table.padding_idx} on, and "
            f"the tokenizer pads with {pad}; use a model made for this tokenizer: pad_token_id in "
            f"its config.json must be {pad}."
        )
    limit = table.num_embeddings - pad - 1
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
    if config.data.pack and "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"model {path!r}: {type(model).__name__} takes no position_ids, which count anew in "
            f"each document of a packed sequence; use data.pack=false."
        )
