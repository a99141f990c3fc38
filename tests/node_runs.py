"""Distils each config named on the command line, in the processes the environment describes. Beside
each config stands, for each process, what its teacher held and sent in training, the time-outs of
the groups then, how much of the student it held a second time for its node, and why the run was
refused. `perturbed` in a config's name: the weights that the
last process holds of the teacher are not what was read."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from wire import counted

from mlkd_dist import config as configs
from mlkd_dist import distill, engine, stage, teacher
from mlkd_dist.models.model import quiet
from mlkd_dist.processes.waiting import limits
from mlkd_dist.watching.watch import Desynchronised

seen: dict[str, Any] = {}
frozen_config = engine.frozen_config


class Watched(teacher.Teacher):
    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        parameters = list(self.model.parameters())
        held = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in parameters]
        seen["whole"] = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        seen["held"], seen["calls"] = sum(p.numel() for p in held), []
        if "perturbed" in path and world.rank == world.size - 1:
            with torch.no_grad():
                max(held, key=lambda p: p.numel()).mul_(1.1)

    def __call__(self, *args: Any, **named: Any) -> Any:
        with counted() as found:
            trace = super().__call__(*args, **named)
        seen["calls"].append([(sent.kind, sent.size, sent.ranks) for sent in found])
        seen["limits"] = limits()
        return trace


def noted(*args: Any) -> Any:
    made = student_engine(*args)
    again = [getattr(p, "ds_secondary_tensor", None) for p in made.module.parameters()]
    seen["second"] = sum(tensor.numel() for tensor in again if tensor is not None)
    seen["student"] = sum(getattr(p, "ds_numel", p.numel()) for p in made.module.parameters())
    return made


def every_weight_sharded(*args: Any) -> dict[str, Any]:
    """Small weights would stay whole between uses, as those of real models do not."""
    found = frozen_config(*args)
    found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return found


student_engine = stage.student_engine
stage.Teacher, teacher.frozen_config = Watched, every_weight_sharded
stage.student_engine = noted
world = engine.start()
quiet()
for path in sys.argv[1:]:
    try:
        distill.distill(configs.load(path), world)
    except Desynchronised as error:
        seen["refused"] = str(error)
    Path(f"{path}.{world.rank}.json").write_text(json.dumps(seen))
    seen.clear()
engine.stop()
