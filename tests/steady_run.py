"""Distils the config named on the command line, in the processes the environment describes, and
writes beside it what each process holds after every 20th step: bytes of tensors, and of memory."""

import json
import sys
from pathlib import Path
from typing import Any

from held import held, own_bytes

from mlkd_dist import config as configs
from mlkd_dist import distill, stage
from mlkd_dist.engine import start, stop
from mlkd_dist.models.model import quiet

step_of_distill, found = stage.train_step, []


def train_step(*args: Any, **named: Any) -> None:
    step_of_distill(*args, **named)
    steps.append(None)
    if len(steps) % 20 == 0:
        found.append((held(), own_bytes()))


steps: list[None] = []
stage.train_step = train_step
world = start()
quiet()
(path,) = sys.argv[1:]
distill.distill(configs.load(path), world)
Path(f"{path}.{world.rank}.json").write_text(json.dumps(found))
stop()
