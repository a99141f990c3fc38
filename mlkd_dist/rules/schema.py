"""What losses a config may name and what options they take, read from their files without importing
them: losses import torch, and a config must be refused in a second."""

import ast
import math
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from mlkd_dist.config import TermConfig, UserError
from mlkd_dist.layer_map import is_pairs
from mlkd_dist.rules.allowed import above, at_least, nearest, one_of, share

LOSSES = Path(__file__).parent.parent / "losses"


@dataclass(frozen=True)
class LossSchema:
    """What the file of a loss says about it; see mlkd_dist/losses/__init__.py."""

    rows: str
    scope: str
    reads: tuple[str, ...]
    teacher: bool
    projection: bool
    same_heads: bool
    packed: bool
    options: dict[str, tuple[str, Any]]  # name -> (annotation, default)

    def common(self) -> list[str]:
        """The options of TermConfig that mean something for this loss."""
        names = ["weight"]
        names += ["layers", "sum_layers"] if self.in_pairs else []
        names += ["average"] if self.rows == "token" else []
        names += ["project"] if self.projection else []
        names += ["shared_projection"] if self.projection and self.in_pairs else []
        return names

    @property
    def in_pairs(self) -> bool:
        """Whether it compares a layer of the student with one of the teacher."""
        return self.scope in ("layer", "module")

    def read_by(self, options: dict[str, Any]) -> tuple[str, ...]:
        """What this loss reads of a trace under these options."""
        of = options.get("of") or self.reads
        return (of,) if isinstance(of, str) else tuple(of)


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
        if arg.arg not in ("backend", "row_weight")
    }
    known = {
        key: constants[key.upper()] for key in ("rows", "scope", "reads", "teacher", "projection")
    }
    flags = {key: constants.get(key.upper(), False) for key in ("same_heads", "packed")}
    return LossSchema(options=options, **flags, **known)


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
    if options.get("beta") is not None:
        check_beta(where, options["beta"], options.get("kind", ""))
    smoothing = options.get("label_smoothing", 0)
    if not 0 <= smoothing < 1:
        raise UserError(
            f"{where}.label_smoothing: {smoothing} is not allowed; it must be 0 or more and below "
            f"1."
        )
    if options.get("layers") is not None:
        check_layers(where, options["layers"])
    at_least(f"{where}.weight", options["weight"], 0)


def check_beta(where: str, beta: float, kind: str) -> None:
    if kind != "jsd" and not kind.startswith("skew"):
        raise UserError(
            f"{where}.beta: {beta} is given with kind {kind}, which mixes nothing; remove it, or "
            f"use jsd, skew_forward_kl or skew_reverse_kl."
        )
    share(f"{where}.beta", beta)


def check_layers(where: str, layers: Any) -> None:
    """Its form; which layers there are is known with the models."""
    if layers not in ("uniform", "last") and not is_pairs(layers):
        close = nearest(layers, ["uniform", "last"])
        raise UserError(
            f"{where}.layers: {layers!r} is not allowed{close}; use uniform, last, or pairs "
            f"[[student, teacher], ...] of layer numbers counted from 0."
        )
