"""Which processes share a node, and their own group: what they gather there crosses no network."""

from datetime import timedelta
from functools import lru_cache
from itertools import pairwise

import torch.distributed as dist

from mlkd_dist.config import UserError
from mlkd_dist.processes.waiting import PATIENCE
from mlkd_dist.processes.world import World, gather_objects


def shard_group(name: str, world: World) -> dist.ProcessGroup | None:
    """Over which processes a frozen model is sharded (`teacher.shard_group`); None: over all. Every
    process calls this. UserError where the launcher's processes make no such groups."""
    return node_group(dist.group.WORLD, world.local_rank) if name == "node" else None


@lru_cache(maxsize=1)
def node_group(everyone: dist.ProcessGroup, local_rank: int) -> dist.ProcessGroup | None:
    """Of all processes `everyone` those beside this one; None where these are all. Made once: each
    group has connections of its own."""
    rank = dist.get_rank(everyone)
    nodes = by_node(gather_objects(local_rank))
    if len(nodes) == 1:
        return None
    return dist.new_group(
        next(node for node in nodes if rank in node),
        timeout=timedelta(seconds=PATIENCE),
        # Else every process has a part in making every group.
        use_local_synchronization=True,
    )


def by_node(local_ranks: list[int]) -> list[list[int]]:
    """Ranks of each node, of what every process has as its rank there."""
    starts = [rank for rank, local in enumerate(local_ranks) if local == 0]
    nodes = [list(range(*ends)) for ends in pairwise([*starts, len(local_ranks)])]
    if [rank - node[0] for node in nodes for rank in node] != local_ranks:
        raise UserError(
            f"teacher.shard_group: node needs processes that are numbered node by node, and the "
            f"launcher gave LOCAL_RANK {local_ranks}; use launch/, or world."
        )
    if len(nodes) > 1 and min(map(len, nodes)) == 1:
        raise UserError(
            "teacher.shard_group: node shards nothing where a node has one process, as one here "
            "has; use world, or teacher.zero_stage=0 for a teacher that is whole everywhere."
        )
    return nodes
