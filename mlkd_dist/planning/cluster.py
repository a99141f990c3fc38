"""The words of `mlkd plan` that are not settings of the run."""

import math
from dataclasses import dataclass, fields

from mlkd_dist.planning.footprint import GIB
from mlkd_dist.rules.allowed import UserError, nearest
from mlkd_dist.saving.commit import writable


@dataclass
class Cluster:
    """The words of `mlkd plan` that are not settings of the run."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    """GiB of one GPU."""
    reserve: float = 3.0
    """GiB that are not for tensors: CUDA, NCCL, gaps."""
    bandwidth: float | None = None
    """GB/s that one GPU sends; with it, traffic is told in seconds too."""
    node_bandwidth: float | None = None
    """GB/s that one GPU sends to those of its node; without it, a teacher that is sharded inside
    the node costs no seconds."""
    tflops: float | None = None
    """TFLOP/s that one GPU reaches in practice; with it, arithmetic is told in seconds too."""
    out: str | None = None
    """A file for the recommended config."""
    json: str | None = None
    """A file for the plan."""

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


def cluster_of(words: list[str]) -> tuple[Cluster, list[str]]:
    """The cluster, and the words that are settings of the run."""
    cluster, settings = Cluster(), []
    kinds = {field.name: type(field.default) for field in fields(Cluster)}
    for word in words:
        key, _, value = word.partition("=")
        if key not in kinds:
            if "." not in key and key not in ("log_every", "kernels", "trust_remote_code"):
                close = nearest(key, list(kinds))
                raise UserError(f"argument {word!r}: there is no such setting of a plan{close}.")
            settings.append(word)
            continue
        number = {"nodes": int, "gpus_per_node": int, "out": str, "json": str}.get(key, float)
        try:
            setattr(cluster, key, number(value))
        except ValueError as error:
            raise UserError(f"argument {word!r}: {key} is a number.") from error
    for key in ("nodes", "gpus_per_node", "gpu_memory", "bandwidth", "node_bandwidth", "tflops"):
        given = getattr(cluster, key)
        if given is not None and not given > 0:
            raise UserError(f"{key}: {given} is not allowed; give more than 0.")
    for key in ("out", "json"):
        place = getattr(cluster, key)
        if place is not None and not writable(place):
            raise UserError(f"{key}: {place!r} cannot be written; name a file.")
    if not 0 <= cluster.reserve < math.inf:
        raise UserError(f"reserve: {cluster.reserve} is not allowed; give 0 or more.")
    return cluster, settings


def room(cluster: Cluster) -> float:
    return (cluster.gpu_memory - cluster.reserve) * GIB
