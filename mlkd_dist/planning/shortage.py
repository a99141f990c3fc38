"""What is said when memory runs out: which settings would have fitted, by `mlkd plan`."""

import os
import sys
from dataclasses import asdict

import psutil
import torch

from mlkd_dist.config import Config, UserError
from mlkd_dist.plan import recommended, with_choice, with_parts
from mlkd_dist.planning.cluster import Cluster
from mlkd_dist.planning.footprint import GIB
from mlkd_dist.planning.model_sizes import models_of
from mlkd_dist.processes.signals import is_first_with
from mlkd_dist.rules.settings import flat

# Without a GPU: GiB of a process that are not for tensors.
RESERVE = 1.0


def is_shortage(error: BaseException) -> bool:
    # A CPU's allocator has no exception of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def say_shortage(config: Config, rank: int, size: int) -> None:
    """One sentence, of one of the processes that `mlkd` has started: they are alike."""
    if not is_first_with("shortage"):
        return
    gpu = torch.cuda.is_available()
    cluster = cluster_of_run(config, size, gpu)
    place = f"the {cluster.gpu_memory:.1f} GiB of its {'GPU' if gpu else 'share of the machine'}"
    print(
        f"mlkd: error: process {rank} ran out of memory, {place}: {advice(config, cluster, gpu)}",
        file=sys.stderr,
        flush=True,
    )


def cluster_of_run(config: Config, size: int, gpu: bool) -> Cluster:
    """Of `size` processes, those of a machine as many as the launcher says."""
    said = [os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")]
    beside = min(size, int(next(filter(None, said), config.launch.processes)))
    if gpu:
        memory, reserve = torch.cuda.get_device_properties(0).total_memory, Cluster.reserve
    else:
        memory, reserve = psutil.virtual_memory().total / beside, RESERVE
    return Cluster(
        nodes=size // beside, gpus_per_node=beside, gpu_memory=memory / GIB, reserve=reserve
    )


def advice(config: Config, cluster: Cluster, gpu: bool) -> str:
    """What to change."""
    hopeless = "use more processes on more machines, or a lower data.max_length."
    try:
        offloads = ("none", "cpu") if gpu else ("none",)
        best = recommended(config, models_of(config), cluster, offloads)
        if best is None:
            return f"by `mlkd plan` nothing fits there; {hopeless}"
        if words := changes(config, with_choice(config, best, cluster)):
            return f"by `mlkd plan` this fits: {words}"
    except UserError:
        pass
    parts = next((n for n in (2, 3, 5, 7) if config.batch.micro_batch % n == 0), None)
    if parts is None:
        return hopeless
    return f"take less at a time, such as {changes(config, with_parts(config, parts))}"


def changes(before: Config, after: Config) -> str:
    """The words that make one of the other, but for what is asked of the launcher."""
    old, new = (flat(asdict(config)) for config in (before, after))
    words = [f"{key}={value}" for key, value in new.items() if old.get(key) != value]
    return " ".join(word for word in words if not word.startswith("launch."))
