"""Distils each config named on the command line, in the processes the environment describes."""

import sys

from mlkd_dist import config as configs
from mlkd_dist.distill import distill
from mlkd_dist.engine import start, stop
from mlkd_dist.model import quiet

world = start()
quiet()
for path in sys.argv[1:]:
    distill(configs.load(path), world)
stop()
