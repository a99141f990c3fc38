"""The only file that knows matplotlib."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlkd_dist.studies.results import Row
from mlkd_dist.studies.study import Plan


def plot(measure: str, rows: list[Row], asked: Plan, path: Path) -> None:
    """Mean and standard deviation of each method: over budgets where there are several, else one
    method beside the other."""
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
