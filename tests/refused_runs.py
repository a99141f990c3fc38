"""Distils each config named on the command line, all of which are to be refused, in one process;
what was said is written as JSON: path -> [kind of the error, its message]."""

import json
import sys
from pathlib import Path

from mlkd_dist import config as configs
from mlkd_dist.distill import distill
from mlkd_dist.engine import start, stop
from mlkd_dist.models.model import quiet

world = start()
quiet()
said = {}
for path in sys.argv[2:]:
    try:
        distill(configs.load(path), world)
        said[path] = ["done", ""]
    except Exception as error:
        said[path] = [type(error).__name__, str(error)]
Path(sys.argv[1]).write_text(json.dumps(said))
stop()
