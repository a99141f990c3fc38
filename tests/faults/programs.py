"""What the processes of a case may be: imported once, in the process that all are forked from."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import interrupted_runs

from faults import cost, damaged, growth
from mlkd_dist import distill, stage
from mlkd_dist.inputs.batches import Sampler
from mlkd_dist.saving import commit

# What a run would else import by and by, in most of its time.
for late in (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "mlkd_dist.tasks.classification",
    "sklearn.metrics",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
):
    import_module(late)


def points(words: list[str]) -> int:
    """A run that writes beside its config which points of commit.py it passes."""
    import os

    file = Path(words[0]).with_suffix(f".{os.environ['RANK']}").open("a")
    commit.reached = lambda point: print(point, file=file, flush=True)
    return distill.main(words)


def with_rows(words: list[str]) -> int:
    """Runs that write beside their folder which rows each process takes in each step."""
    make = stage.stage_sampler

    def sampler(run: Any, at: Any) -> Sampler:
        made, world = make(run, at), run.world
        step = made.step
        file = (run.folder.parent / f"rows-{world.size}-{world.rank}").open("a")

        def taken(number: int) -> list[list[int]]:
            found = step(number)
            print(json.dumps([number, sum(found, [])]), file=file, flush=True)
            return found

        made.step = taken
        return made

    stage.stage_sampler = sampler
    return interrupted_runs.main(words)


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "distill": distill.main,
    "interrupted": interrupted_runs.main,
    "interrupted with rows": with_rows,
    "points": points,
    "damages": damaged.damages,
    "growth": growth.grow,
    "cost": cost.compare,
}
