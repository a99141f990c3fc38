"""What came of a study: every run's figures, their means and spreads, and tables."""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mlkd_dist.studies.folder import finished, report_of
from mlkd_dist.studies.study import Plan, Planned


@dataclass(frozen=True)
class Row:
    """One method's figures of one measure in one budget; `spread` is the standard deviation of a
    sample (n - 1), None of a single number. A difference is the method's minus the baseline's of
    the same seed."""

    measure: str
    budget: str
    method: str
    n: int
    mean: float
    spread: float | None
    pairs: int
    difference: float | None
    difference_spread: float | None


def results(asked: Plan) -> list[dict[str, Any]]:
    """The runs that are there: names, folder, measures, and the last losses of each stage."""
    found = []
    for run in asked.runs:
        if not finished(run, overwrite=True):
            continue
        report = report_of(run.folder)
        found.append(
            {
                "budget": run.budget,
                "method": run.method,
                "seed": run.seed,
                "folder": str(run.folder),
                "metrics": str(run.folder / "metrics.jsonl"),
                "measures": measures(report["student"]),
                "teacher": measures(report.get("teacher", {})),
                "losses": last_losses(run),
            }
        )
    return found


def measures(facts: dict[str, Any]) -> dict[str, float]:
    """The figures of a model in a report, by the names of the report's table."""
    named = dict(facts.get("quality", {}))
    named |= {f"{key} with teacher": value for key, value in facts.get("agreement", {}).items()}
    named |= {key: facts[key] for key in ("parameters", "latency_ms") if facts.get(key) is not None}
    return named


def last_losses(run: Planned) -> dict[str, dict[str, float]]:
    """Stage -> loss -> its value in the stage's last line of metrics.jsonl."""
    found: dict[str, dict[str, float]] = {}
    path = run.folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        losses = {k.removeprefix("loss/"): v for k, v in row.items() if k.startswith("loss/")}
        found[row.get("stage", "")] = losses or found.get(row.get("stage", ""), {})
    return found


def summary(found: list[dict[str, Any]], baseline: str) -> list[Row]:
    """In the order of the runs: measures, then budgets, then methods."""
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for name in dict.fromkeys(name for run in found for name in run["measures"]):
        for run in found:
            if name in run["measures"]:
                key = (name, run["budget"], run["method"])
                values.setdefault(key, {})[run["seed"]] = run["measures"][name]
    rows = []
    for (measure, budget, method), by_seed in values.items():
        theirs = values.get((measure, budget, baseline), {}) if method != baseline else {}
        pairs = [by_seed[seed] - theirs[seed] for seed in by_seed if seed in theirs]
        of_all, of_pairs = spread([*by_seed.values()]), spread(pairs)
        rows.append(Row(measure, budget, method, len(by_seed), *of_all, len(pairs), *of_pairs))
    return rows


def spread(values: list[float]) -> tuple[float | None, float | None]:
    """(mean, standard deviation of the sample)."""
    return (mean(values) if values else None, stdev(values) if len(values) > 1 else None)


def write_results(asked: Plan) -> str:
    """study.json, study.csv and study.md of the runs that are there; returns the tables."""
    found = results(asked)
    rows = summary(found, asked.study.baseline)
    folder = asked.folder
    told = {
        "baseline": asked.study.baseline,
        "methods": asked.differences,
        "budgets": asked.study.budgets,
        "runs": found,
        "missing": missing(asked, found),
        "summary": [asdict(row) for row in rows],
    }
    replace(folder / "study.json", json.dumps(told, indent=2) + "\n")
    write_csv(folder / "study.csv", found)
    tables = "\n\n".join(markdown(asked, found, rows))
    replace(folder / "study.md", "\n\n".join([tables, *notes(asked, found)]) + "\n")
    return tables


def replace(path: Path, text: str) -> None:
    """A reader sees the file before or after, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def write_csv(path: Path, found: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for run in found for name in run["measures"]))
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget", "method", "seed", *names, "folder"])
        for run in found:
            values = [run["measures"].get(name, "") for name in names]
            writer.writerow([run["budget"], run["method"], run["seed"], *values, run["folder"]])
    partial.replace(path)


def missing(asked: Plan, found: list[dict[str, Any]]) -> list[str]:
    there = {run["folder"] for run in found}
    return [run.name for run in asked.runs if str(run.folder) not in there]


def markdown(asked: Plan, found: list[dict[str, Any]], rows: list[Row]) -> Iterator[str]:
    """One table per measure."""
    baseline = asked.study.baseline
    budgets = [*asked.study.budgets]
    if absent := missing(asked, found):
        yield f"{len(absent)} of {len(asked.runs)} runs are missing: {', '.join(absent)}."
    for measure in dict.fromkeys(row.measure for row in rows):
        lines = [
            f"| {measure} | budget | n | mean | sd | minus {baseline} | sd |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        teachers = {}
        for run in found:
            # Each run measures its time anew.
            if measure in run["teacher"] and measure != "latency_ms":
                teachers.setdefault(run["budget"], shown(measure, run["teacher"][measure]))
        # A budget may have other held-out rows.
        if len({*teachers.values()}) == 1:
            teachers = {"": next(iter(teachers.values()))}
        for budget, value in teachers.items():
            lines.append(f"| {' | '.join(['teacher', budget, '', value, '', '', ''])} |")
        own = [row for row in rows if row.measure == measure]
        for row in sorted(own, key=lambda row: budgets.index(row.budget)):
            values = (row.mean, row.spread, row.difference, row.difference_spread)
            cells = [shown(measure, value) for value in values]
            cells = [row.method, row.budget, str(row.n), *cells]
            lines.append(f"| {' | '.join(cells)} |")
        yield "\n".join(lines)


def shown(measure: str, value: float | None) -> str:
    if value is None:
        return ""
    if measure == "parameters":
        return f"{value / 1e6:.2f} M"
    return f"{value:.1f}" if measure == "latency_ms" else f"{value:.4f}"


def notes(asked: Plan, found: list[dict[str, Any]]) -> Iterator[str]:
    """What each method changes, and where each run lies."""
    yield "What each method changes of the base:"
    yield "\n".join(
        f"- {method}: `{flow(changes)}`" if changes else f"- {method}: nothing"
        for method, changes in asked.differences.items()
    )
    budgets = {name: changes for name, changes in asked.study.budgets.items() if changes}
    if budgets:
        yield "\n".join(f"- budget {name}: `{flow(changes)}`" for name, changes in budgets.items())
    yield "Losses of each run, step by step:"
    yield "\n".join(
        f"- {run['budget']}, {run['method']}, seed {run['seed']}: "
        f"[metrics.jsonl]({Path(run['metrics']).relative_to(asked.folder)})"
        for run in found
    )


def flow(changes: dict[str, Any]) -> str:
    """As words of the command line."""
    return " ".join(f"{key}={json.dumps(value).replace(' ', '')}" for key, value in changes.items())
