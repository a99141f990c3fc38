"""Sentences about values that a setting may not have."""

import math
from typing import Any

from mlkd_dist.config import UserError, nearest


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
