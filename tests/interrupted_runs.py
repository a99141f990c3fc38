"""Distils each config named on the command line, in the processes the environment describes.

`PATH@STEP` ends a run before that optimizer step, as if the processes were killed there;
`PATH:POINT` ends it where it passes that point of commit.py for the first time, and `PATH~STEP`
makes the loss of the first process alone a NaN in that step. What happened is written beside each
config, as JSON: the kind of the error and its message.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from mlkd_dist import commit, distill, stage
from mlkd_dist import config as configs
from mlkd_dist.checkpoint import NotSaved
from mlkd_dist.config import UserError
from mlkd_dist.engine import start, stop
from mlkd_dist.model import quiet
from mlkd_dist.watch import Diverged, Stopped


class Killed(BaseException):
    pass


world = start()
quiet()
step_of_distill, backward_of_distill = stage.train_step, stage.backward
asked: dict[str, str] = {}
at: dict[str, str] = {}


def train_step(teacher: Any, student: Any, *rest: Any) -> None:
    at["step"] = str(rest[4][1])
    if asked.get("@") == at["step"]:
        raise Killed
    step_of_distill(teacher, student, *rest)


def backward(student: Any, loss: Any) -> None:
    wrong = world.first and asked.get("~") == at["step"]
    backward_of_distill(student, loss * math.nan if wrong else loss)


def reached(point: str) -> None:
    if point == asked.get(":"):
        raise Killed


stage.train_step, stage.backward, commit.reached = train_step, backward, reached
for word in sys.argv[1:]:
    path, *what = re.split("([@:~])", word)
    asked.clear()
    asked |= dict([what]) if what else {}
    config = configs.load(path)
    try:
        distill.distill(config, world)
        said = ["done", ""]
    except (Killed, UserError, Stopped, Diverged, NotSaved) as error:
        said = [type(error).__name__, str(error)]
    if world.first:
        Path(path).with_suffix(".said").write_text(json.dumps(said))
stop()
