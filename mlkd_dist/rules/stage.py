"""What a stage may be: how long, with which losses and their options."""

import math
from typing import Any

from mlkd_dist.config import StageConfig, UserError
from mlkd_dist.rules.allowed import at_least, nearest
from mlkd_dist.rules.openings import check_open
from mlkd_dist.rules.schema import LOSSES, check_layers, loss_options, loss_schema, names
from mlkd_dist.rules.task import VOCABULARY


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
        stage.losses[name] = options = loss_options(key, schema, given)
        if options.get("positives") == "label" and task != "classification":
            raise UserError(
                f"{key}.positives: label needs classes, and the task {task} has none; use sample "
                f"or auto."
            )
        if options.get("label_smoothing") and task in ("regression", "question_answering"):
            raise UserError(
                f"{key}.label_smoothing: the task {task} has no classes to smooth over; remove it."
            )
        if options.get("truncate") and task not in VOCABULARY:
            raise UserError(
                f"{key}.truncate: only for tasks over a vocabulary ({', '.join(VOCABULARY)}), "
                f"given with {task}; remove it."
            )
    if stage.open is not None:
        check_open(where, stage.open, stage.losses)
