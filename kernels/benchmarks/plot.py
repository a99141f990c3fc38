"""Bars of the times in the CSVs, as shares of each case's slowest; one figure for each device.

Needs matplotlib, which is no requirement of anything else here.

python kernels/benchmarks/plot.py FOLDER [CSV ...]     default: all of results/
"""

import argparse
import re
import sys
from itertools import groupby
from pathlib import Path

import results
from harness import BOTH
from report import cell, in_order, machine_of
from results import Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the images")
    parser.add_argument("csv", nargs="*", type=Path, help="default: all in results/")
    options = parser.parse_args()
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("The plots need matplotlib, which is not installed here: pip install matplotlib")
    # No window is opened.
    matplotlib.use("agg")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = results.read(*(options.csv or sorted(results.FOLDER.glob("*.csv"))))
    rows = [
        row for row in in_order(rows) if row["direction"] == BOTH and row["ms_p50"][0].isdigit()
    ]
    for (device, threads), group in groupby(rows, key=machine_of):
        name = re.sub(r"[^a-z0-9]+", "-", f"{device} {threads}".lower()).strip("-")
        draw(
            f"{device}: forward and backward, ms / extra MiB",
            list(group),
            options.folder / f"{name}.png",
        )


def draw(title: str, rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot

    ops = [(op, list(group)) for op, group in groupby(rows, key=lambda row: row["op"])]
    cases = [list(dict.fromkeys(map(place_of, group))) for _, group in ops]
    figure, axes = pyplot.subplots(
        len(ops),
        figsize=(9, 1 + sum(0.5 + 0.7 * len(each) for each in cases)),
        height_ratios=[0.5 + len(each) for each in cases],
        squeeze=False,
        layout="constrained",
    )
    names = list(dict.fromkeys(row["backend"] for row in rows))
    for axis, (op, group), places in zip(axes[:, 0], ops, cases, strict=True):
        thick = 0.8 / len(names)
        slowest = {place: max(time(r) for r in group if place_of(r) == place) for place in places}
        for i, name in enumerate(names):
            own = [row for row in group if row["backend"] == name]
            at = [places.index(place_of(row)) + i * thick for row in own]
            shares = [time(row) / (slowest[place_of(row)] or 1) for row in own]
            bars = axis.barh(at, shares, thick, color=f"C{i}", label=name)
            axis.bar_label(bars, [f" {cell(row)}" for row in own], fontsize=6)
        labels = [f"{shape}, {dtype}" for shape, dtype in places]
        axis.set_yticks([i + 0.4 - thick / 2 for i in range(len(places))], labels, fontsize=7)
        axis.set(title=op, xlim=(0, 1.25), xticks=[])
        axis.invert_yaxis()
    figure.suptitle(title)
    handles, shown = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
    print(path)


def place_of(row: Row) -> tuple[str, str]:
    return row["shape"], row["dtype"]


def time(row: Row) -> float:
    return float(row["ms_p50"]) if row["ms_p50"][0].isdigit() else 0.0


if __name__ == "__main__":
    main()
