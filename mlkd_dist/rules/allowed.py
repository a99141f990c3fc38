"""What a setting may be: which keys there are, of which type, in which range; and the error that
says so."""

import difflib
import math
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """A mistake of the person who runs the program, told in one message; the program exits with
    code 2."""


def nearest(word: str, allowed: list[str]) -> str:
    """` (did you mean 'x'?)` where something in `allowed` is like `word`, else nothing."""
    close = difflib.get_close_matches(str(word), allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


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


# Types of settings, in words.
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def check_given(given: Any, kind: Any, path: str = "", root: Any = None) -> None:
    """UserError that names the full path of the first key that does not exist or is of another
    type than `kind`, a dataclass or the type of a field, asks for. OmegaConf checks too, but inside
    lists it names only the last part of a key."""
    root = root or kind
    if kind is Any:
        return
    if isinstance(kind, UnionType):
        if given is not None:
            check_given(given, get_args(kind)[0], path, root)
    elif is_dataclass(kind):
        check_keys(given, kind, path, root)
    elif get_origin(kind) is list:
        if not isinstance(given, list):
            raise UserError(f"{path}: {shown(given)} is not allowed; give a list, as in [...].")
        for index, value in enumerate(given):
            check_given(value, get_args(kind)[0], f"{path}[{index}]", root)
    elif get_origin(kind) is dict:
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            raise UserError(f"{path}: {shown(given)} is not allowed; give names with their values.")
    elif not fits(given, kind):
        hint = " in quotes" if kind is str and given is not None else ""
        raise UserError(f"{path}: {shown(given)} is not allowed; give {KINDS[kind]}{hint}.")


def shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 80 else f"{text[:80]}..."


def fits(given: Any, kind: type) -> bool:
    if kind is bool or isinstance(given, bool):
        return type(given) is kind
    return isinstance(given, {int: int, float: int | float, str: str | int | float}[kind])


def check_keys(given: Any, kind: Any, path: str, root: Any) -> None:
    kinds = get_type_hints(kind)
    allowed = ", ".join(kinds)
    if not isinstance(given, dict):
        raise UserError(
            f"{path or 'config'}: {shown(given)} is not allowed; give keys and values of: "
            f"{allowed}."
        )
    before = f"{path}." if path else ""
    for key, value in given.items():
        if key not in kinds:
            meant = near_key(str(key), before, list(kinds), root)
            raise UserError(f"{before}{key}: no such key{meant}; allowed here: {allowed}.")
        check_given(value, kinds[key], f"{before}{key}", root)


def near_key(word: str, before: str, here: list[str], root: Any) -> str:
    """` (did you mean 'path.x'?)` of the keys one below `root` that are called so, else of one here
    that is like it."""
    elsewhere = [
        f"{block.name}.{word}"
        for block in (fields(root) if is_dataclass(root) else ())
        if is_dataclass(block.default_factory) and word in get_type_hints(block.default_factory)
    ]
    close = [f"{before}{key}" for key in difflib.get_close_matches(word, here, n=1)]
    meant = " or ".join(map(repr, elsewhere or close))
    return f" (did you mean {meant}?)" if meant else ""
