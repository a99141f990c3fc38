"""How long the processes of a run wait for one another, and what it means when one waits in vain.

DeepSpeed makes groups of its own, with torch's time-outs of 10 or 30 minutes whatever the first
group was given; torch has a private function alone to change that of a group which exists.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# Seconds, where one process may be at work alone: it reads data, evaluates, writes a checkpoint.
PATIENCE = 2 * 60 * 60.0


def wait_at_most(seconds: float) -> None:
    """From now on, in every group that there is."""
    for group in groups():
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def groups() -> list[dist.ProcessGroup]:
    """All that this process is in."""
    return list(distributed_c10d._world.pg_map) if dist.is_initialized() else []


def limits() -> list[float]:
    """The time-out of every group, in seconds."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    backends = [group._get_backend(torch.device(kind)) for group in groups()]
    return [backend.options._timeout.total_seconds() for backend in backends]


def lost_contact(error: BaseException | None) -> str | None:
    """What torch says where an error is, or comes from, another process that is gone or silent;
    None for any other error."""
    while error is not None:
        text = str(error).strip()
        network = isinstance(error, dist.DistError) or "gloo" in text
        if isinstance(error, RuntimeError) and network and text:
            return text.splitlines()[0]
        error = error.__cause__ or error.__context__
    return None
