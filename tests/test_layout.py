"""The rules of the house that can be read off its files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

HOUSE = ROOT / "mlkd_dist"
KERNELS = ROOT / "kernels" / "mlkd_kernels"
FILES = sorted([*HOUSE.rglob("*.py"), *KERNELS.rglob("*.py")])
# What a loss or a task may use of the house: traces, and its own package.
BELOW = {"mlkd_dist.trace", "mlkd_dist.models.head", "mlkd_dist.losses", "mlkd_dist.tasks"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, and every name imported from one."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
    }


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 20


def test_deepspeed_and_tensorboard_have_one_door_each() -> None:
    assert importers("deepspeed") == {"mlkd_dist/engine.py"}
    tensorboard = importers("torch.utils.tensorboard") | importers("tensorboard")
    assert tensorboard == {"mlkd_dist/metrics.py"}


def test_triton_is_used_by_kernels_only() -> None:
    assert all(path.startswith("kernels/mlkd_kernels/") for path in importers("triton"))


def test_kernels_know_nothing_of_the_house() -> None:
    for path in KERNELS.rglob("*.py"):
        assert not within(imports(path), "mlkd_dist"), path


# Nothing of these is needed to know what a config may say, a model shows, or a row of data holds.
ABOVE = {
    f"mlkd_dist.{name}"
    for name in """bench checkpoint cli distill evaluate finetune generation objective plan planning
    preflight run stage student studies teacher watching""".split()
}


@pytest.mark.parametrize("room", ["rules", "models", "inputs", "losses", "tasks"])
def test_rooms_below_know_nothing_of_those_above(room: str) -> None:
    files = [*(HOUSE / room).glob("*.py")]
    assert len(files) > 4
    for path in files:
        assert not imports(path) & ABOVE, path


@pytest.mark.parametrize("room", ["losses", "tasks"])
def test_losses_and_tasks_know_traces_only(room: str) -> None:
    for path in (HOUSE / room).glob("*.py"):
        above = {
            name
            for name in within(imports(path), "mlkd_dist")
            if not any(within({name}, package) for package in BELOW)
        }
        assert above <= {"mlkd_dist"}, (path, above)


def test_reading_a_config_imports_nothing_heavy() -> None:
    """All that `mlkd` imports at its top before a config is known to be good."""
    heavy = {"torch", "transformers", "deepspeed", "datasets", "mlkd_kernels", "numpy"}
    seen, waiting = set(), [HOUSE / "cli.py"]
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        top = {
            name
            for node in tree(path).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in top_names(node)
        }
        assert not {name.partition(".")[0] for name in top} & heavy, path
        house = [ROOT / name.replace(".", "/") for name in within(top, "mlkd_dist")]
        waiting += [path.with_suffix(".py") for path in house]
        if path.name == "config.py":
            # It imports its checks where it calls them.
            waiting.append(HOUSE / "rules" / "validate.py")
    assert {path.name for path in seen} >= {"cli.py", "config.py", "validate.py", "layer_map.py"}


def top_names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_engine_is_gone_around() -> None:
    """`engine.module(...)` runs a model without the hooks that gather its sharded weights."""
    for path in FILES:
        calls = [
            node.func
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        ]
        assert not [c for c in calls if c.attr == "module"], path


def test_no_file_stands_in_the_way() -> None:
    # It would shadow the package `kernels` of Hugging Face.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]
