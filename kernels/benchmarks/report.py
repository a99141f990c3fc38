"""The table of kernels/README.md, made from the CSVs in results/, so that nobody types a number.

python kernels/benchmarks/report.py            writes the table between its markers and prints it
python kernels/benchmarks/report.py --check    exits 1 where the table is not that of the CSVs
"""

import argparse
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import results
from harness import BOTH
from measure import OOM
from results import Row
from shapes import SHAPES

README = results.FOLDER.parents[1] / "README.md"
BEGIN = "<!-- written by benchmarks/report.py -->"
END = "<!-- end of what report.py writes -->"
# Left to right; others follow by name.
BACKENDS = ("eager", "plain", "compiled", "attention calls", "streamed", "auto", "triton")


def text(rows: Iterable[Row]) -> str:
    """A table for each device, its date and versions above it."""
    return "\n\n".join(
        "\n\n".join([heading(machine), *sections(list(group))])
        for machine, group in groupby(in_order(rows), key=machine_of)
    )


def in_order(rows: Iterable[Row]) -> list[Row]:
    """The last of each measurement, by device and operation and then as the registry has it."""
    return sorted(results.latest(rows).values(), key=place)


def machine_of(row: Row) -> tuple[str, str]:
    return row["device"], row["threads"]


def place(row: Row) -> tuple:
    cases = [(op, case) for op, of in SHAPES.items() for group in of.values() for case in group]
    return *machine_of(row), cases.index((row["op"], row["case"])), row["dtype"]


def heading(machine: tuple[str, str]) -> str:
    device, threads = machine
    return f"### {device}" + (f", {threads} threads" if threads else "")


def sections(rows: list[Row]) -> Iterable[str]:
    for op, group in groupby(rows, key=lambda row: row["op"]):
        yield f"`{op}`, {versions(own := list(group))}\n\n{table(own)}"


def versions(rows: list[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows}))

    return f"torch {all_of('torch')}, commit {all_of('commit')}, {all_of('date')}:"


def table(rows: list[Row]) -> str:
    names = [name for name in BACKENDS if any(row["backend"] == name for row in rows)]
    names += sorted({row["backend"] for row in rows} - set(names))
    ratio = {"eager", "streamed"} <= set(names)
    more = ["streamed beside eager"] if ratio else []
    lines = [["case", "type", *names, *more], ["---"] * (2 + len(names) + len(more))]
    found = {
        (row["shape"], row["dtype"], row["backend"]): row
        for row in rows
        if row["direction"] == BOTH
    }
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in rows):
        cells = [cell(found.get((shape, dtype, name))) for name in names]
        pair = [found.get((shape, dtype, name)) for name in ("eager", "streamed")]
        lines.append([shape, dtype, *cells, *([compared(*pair)] if ratio else [])])
    return "\n".join(f"| {' | '.join(words)} |" for words in lines)


def compared(eager: Row | None, ours: Row | None) -> str:
    """How many times as fast, and the share of the memory."""
    if not eager or not ours or not (eager["ms_p50"][0].isdigit() and ours["ms_p50"][0].isdigit()):
        return ""
    told = f"{float(eager['ms_p50']) / float(ours['ms_p50']):.2g}x"
    if eager["extra_peak_mib"] and ours["extra_peak_mib"]:
        told += f" / {float(ours['extra_peak_mib']) / float(eager['extra_peak_mib']):.0%}"
    return told


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    ms, mib = row["ms_p50"], row["extra_peak_mib"]
    if ms == OOM:
        return f"more than {row['allowed_mib']} MiB"
    if not ms[0].isdigit():
        return ms
    share = f" ({float(row['roof_share']):.0%})" if row["roof_share"] else ""
    return f"{short(float(ms))}{share}" + (f" / {short(float(mib))}" if mib else "")


def short(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def inserted(readme: str, made: str) -> str:
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    parser.add_argument("csv", nargs="*", type=Path, help="default: all in results/")
    options = parser.parse_args()
    paths = options.csv or sorted(results.FOLDER.glob("*.csv"))
    old = README.read_text()
    new = inserted(old, text(results.read(*paths)))
    if options.check:
        sys.exit("kernels/README.md differs from results/; run report.py" if new != old else 0)
    README.write_text(new)
    print(text(results.read(*paths)))


if __name__ == "__main__":
    main()
