"""Does what is named on the command line, `cache` or `distill` each before the path of a config, in
the processes that the environment describes."""

import sys

from mlkd_dist import config as configs
from mlkd_dist.distill import COMMANDS
from mlkd_dist.engine import start, stop
from mlkd_dist.models.model import quiet

world = start()
quiet()
for command, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    COMMANDS[command](configs.load(path), world)
stop()
