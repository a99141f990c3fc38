"""Distils each config named on the command line, in the processes the environment describes.

What the trained student says of its last batch, from inside its engine, is kept beside each run.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from mlkd_dist import config as configs
from mlkd_dist import distill, stage
from mlkd_dist.engine import start, stop
from mlkd_dist.models.model import quiet

world = start()
quiet()
kept: dict[str, Any] = {}
step_of_distill = stage.train_step


def train_step(
    teacher: Any, student: Any, objective: Any, batches: list, *rest: Any, **named: Any
) -> None:
    step_of_distill(teacher, student, objective, batches, *rest, **named)
    hook = student.module.model.register_forward_hook(lambda m, args, out: kept.update(output=out))
    seen = teacher(batches[0])
    rows = objective.global_rows(batches)
    student.eval()
    with torch.no_grad():
        peers = objective.peers(batches[:1], [seen], None)
        student(batches[0], seen, rows, peers)
    student.train()
    hook.remove()
    kept["inputs"] = batches[0].inputs


stage.train_step = train_step
for path in sys.argv[1:]:
    config = configs.load(path)
    distill.distill(config, world)
    if world.first:
        output = kept["output"].get("logits", kept["output"][0])
        saved = {"inputs": kept["inputs"], "output": output.clone()}
        torch.save(saved, Path(config.run.dir) / "trained.pt")
stop()
