"""The only file that knows matplotlib."""

import importlib.util
from pathlib import Path

from mlkd_dist.studies.results import Row, results, summary
from mlkd_dist.studies.study import Plan


def write_plots(asked: Plan) -> list[str]:
    """One plot per measure; what to tell of them."""
    if importlib.util.find_spec("matplotlib") is None:
        return ["no plots: matplotlib is not installed (pip install 'mlkd_dist[plots]')"]
    rows = summary(results(asked), asked.study.baseline)
    measures = dict.fromkeys(row.measure for row in rows if row.measure != "parameters")
    paths = []
    for measure in measures:
        paths.append(asked.folder / f"{measure.replace(' ', '_')}.png")
        plot(measure, [row for row in rows if row.measure == measure], asked, paths[-1])
    return [f"plots: {', '.join(map(str, paths))}"] if paths else []


def plot(measure: str, rows: list[Row], asked: Plan, path: Path) -> None:
    """Mean and standard deviation of each method: over budgets where there are several, else one
    method beside the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    budgets, methods = [*asked.study.budgets], [*asked.study.methods]
    across = budgets if len(budgets) > 1 else methods
    for index, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        # Methods stand a little apart, so that their bars can be told from one another.
        shift = 0.02 * (index - (len(methods) - 1) / 2) if len(budgets) > 1 else 0
        places = [across.index(row.budget if len(budgets) > 1 else method) for row in own]
        axes.errorbar(
            [place + shift for place in places],
            [row.mean for row in own],
            yerr=[row.spread or 0 for row in own],
            marker="o",
            capsize=3,
            label=method,
        )
    axes.set_xticks(range(len(across)), across, rotation=0 if len(budgets) > 1 else 30)
    axes.set_ylabel(measure)
    axes.set_title(f"{measure}: mean and standard deviation over {len(asked.study.seeds)} seeds")
    axes.grid(alpha=0.3)
    if len(budgets) > 1:
        axes.set_xlabel("budget")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
