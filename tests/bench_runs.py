"""Measures each config named on the command line, in the processes the environment describes."""

import sys

from mlkd_dist import config as configs
from mlkd_dist.bench import bench
from mlkd_dist.engine import start, stop
from mlkd_dist.models.model import quiet

world = start()
quiet()
for path in sys.argv[1:]:
    bench(configs.load(path), world)
stop()
