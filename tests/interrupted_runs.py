"""Distils each config named on the command line, in the processes the environment describes.

`PATH@STEP` ends a run before that optimizer step, as if the processes were killed there;
`PATH:POINT` ends it where it passes that point of commit.py for the first time, and `PATH~STEP`
makes the loss of the first process alone a NaN in that step. What happened is written beside each
config, as JSON: the kind of the error and its message.
"""

import json
import re
import sys
from pathlib import Path

from strikes import POINT, STEP, Fault, Killed, struck_by

from mlkd_dist import config as configs
from mlkd_dist import distill
from mlkd_dist.checkpoint import NotSaved
from mlkd_dist.config import UserError
from mlkd_dist.engine import start, stop
from mlkd_dist.models.model import quiet
from mlkd_dist.processes.world import World
from mlkd_dist.watching.watch import Diverged, Stopped


def fault(kind: str, value: str) -> Fault:
    if kind == "@":
        return Fault("end", STEP, int(value))
    if kind == "~":
        return Fault("not finite", STEP, int(value), ranks=(0,))
    return Fault("end", POINT, only=value)


def run(word: str, world: World) -> None:
    path, *what = re.split("([@:~])", word)
    config = configs.load(path)
    try:
        with struck_by([fault(*what)] if what else [], world.rank):
            distill.distill(config, world)
        said = ["done", ""]
    except (Killed, UserError, Stopped, Diverged, NotSaved) as error:
        said = [type(error).__name__, str(error)]
    if world.first:
        Path(path).with_suffix(".said").write_text(json.dumps(said))


def main(words: list[str]) -> int:
    world = start()
    quiet()
    for word in words:
        run(word, world)
    stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
