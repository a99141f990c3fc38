"""By how many bytes a process grows at the peak of two steps of each config named on the command
line, in the processes the environment describes: of those the largest, a line of JSON each."""

import json
import sys
from pathlib import Path

from mlkd_dist import bench, engine
from mlkd_dist import config as configs
from mlkd_dist.bench import STEP, own_folder, peak_of
from mlkd_dist.models.model import quiet
from mlkd_dist.preflight import prepared
from mlkd_dist.processes.world import World, gather_objects
from mlkd_dist.run import on_first, source, starting_student, user_errors


def grown(config: configs.Config, world: World) -> float:
    with own_folder(config, world) as folder:
        run = prepared(config, world, source(config))
        made = on_first(world, user_errors(lambda: starting_student(config, folder)))
        before = peak_of(lambda: None, world.device)
        models = bench.prepare(run, config.stages[0], 0, made or str(folder / "student"))
        models.use(STEP)
        clock = bench.TeacherTime(world.device)

        def work() -> None:
            for index in range(len(models.micro_batches)):
                models.step(STEP, index, clock)

        peak = peak_of(work, world.device)
        models.close()
    return max(gather_objects(peak - before)) * 2**30


# What is freed is to be seen as free; see also MALLOC_MMAP_THRESHOLD_ in test_peaks.py.
engine.keep_freed_memory = lambda: None
world = engine.start()
quiet()
# The first two bring in what is imported and built on the way to a first step, without engines that
# shard and with them.
for path in sys.argv[1:3]:
    grown(configs.load(path), world)
for path in sys.argv[1:]:
    found = {"name": Path(path).stem, "grew": grown(configs.load(path), world)}
    if world.first:
        print(json.dumps(found), flush=True)
engine.stop()
