"""Time-outs of process groups, and processes that are out of step."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mlkd_dist.config import RunConfig
from mlkd_dist.inputs.batches import Sampler
from mlkd_dist.processes.world import World
from mlkd_dist.watching.watch import Desynchronised, Watch


def process(rank: int, folder: Path, results: Any) -> None:
    import torch.distributed as dist

    from mlkd_dist.processes import waiting

    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    # As DeepSpeed makes its own, with no time-out given.
    own = dist.new_group([0, 1])
    waiting.wait_at_most(waiting.PATIENCE)
    assert waiting.limits() == [waiting.PATIENCE] * 2
    waiting.wait_at_most(3)
    assert waiting.limits() == [3.0] * 2
    dist.all_reduce(torch.ones(1), group=own)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    begun = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=own)
    except RuntimeError as error:
        results.put((time.monotonic() - begun, waiting.lost_contact(error)))
    # No unwinding: the other one is frozen.
    results.close()
    results.join_thread()
    os._exit(0)


def test_a_frozen_process_is_noticed_within_the_time_out_of_any_group(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [context.Process(target=process, args=(rank, tmp_path, results)) for rank in (0, 1)]
    for each in both:
        each.start()
    try:
        seconds, reason = results.get(timeout=120)
    finally:
        for each in both:
            each.kill()
    assert 2.5 < seconds < 13 and "imed out" in reason


def test_other_errors_are_no_lost_contact() -> None:
    from mlkd_dist.processes.waiting import lost_contact

    assert lost_contact(ValueError("timed out")) is None
    assert lost_contact(RuntimeError("CUDA out of memory")) is None
    gone = RuntimeError("[gloo/pair.cc:1] Connection closed by peer [::1]:9\nmore")
    try:
        raise KeyError("x") from gone
    except KeyError as error:
        assert lost_contact(error) == "[gloo/pair.cc:1] Connection closed by peer [::1]:9"


def watches(places: list[tuple[int, int]]) -> list[Watch]:
    found = []
    for rank, place in enumerate(places):
        found.append(Watch(RunConfig(), World(rank, len(places), rank, torch.device("cpu"))))
        found[-1].begin_step(*place)
    return found


def test_processes_out_of_step_are_named() -> None:
    agreed = watches([(7, 0xABCDEF12)] * 3)
    agreed[0].sum_flags(sum(watch.flags() for watch in agreed))
    agreed[0].after_step(8, 0)
    for odd, said in (((9, 0xABCDEF12), "step 10"), ((7, 0x11111111), "batch 08888888")):
        apart = watches([(7, 0xABCDEF12), odd, (7, 0xABCDEF12)])
        total = sum(watch.flags() for watch in apart)
        for watch in apart:
            with pytest.raises(Desynchronised, match=f"process 1 is at .*{said}.* the other 2 at"):
                watch.sum_flags(total)


def test_the_mark_of_a_batch_is_that_of_its_rows_and_layout() -> None:
    def mark(step: int, rank: int = 0, rows: int = 100, seed: int = 0) -> int:
        return Sampler(rows, 2, 2, rank, 2, seed).mark(step)

    assert mark(3) == mark(3, rank=1)
    assert len({mark(step) for step in range(200)}) == 200
    assert len({mark(3), mark(3, rows=101), mark(3, seed=1)}) == 3
    assert Sampler(100, 4, 1, 0, 2, 0).mark(3) != mark(3)
    assert mark(3) < 2**32
