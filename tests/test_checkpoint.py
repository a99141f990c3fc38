"""What a checkpoint does when a disk is full, what makes a run stop, and who may write to its
folder; in one process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from places import same
from safetensors.torch import load_file
from transformers import get_scheduler

from mlkd_dist import checkpoint, run
from mlkd_dist.checkpoint import Checkpoints, NotSaved, Position, position
from mlkd_dist.config import Config, RunConfig, UserError
from mlkd_dist.engine import DTYPES, backward, student_engine
from mlkd_dist.processes.signals import Signals
from mlkd_dist.processes.world import World
from mlkd_dist.saving import commit
from mlkd_dist.saving.shards import own_shard
from mlkd_dist.watching import watch
from mlkd_dist.watching.watch import Diverged, Watch

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def checkpoints(tmp_path: Path, one_process: None) -> Checkpoints:
    return Checkpoints(tmp_path, ALONE, keep=2)


def write(folder: Path) -> list[str]:
    (folder / "rank-00000.safetensors").write_bytes(b"weights")
    return ["rank-00000.safetensors"]


def full(folder: Path) -> list[str]:
    write(folder)
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(checkpoints: Checkpoints) -> None:
    checkpoints.commit(Position(0, 10), write, {"stage_done": False})
    with pytest.raises(NotSaved, match="process 0: .*No space left"):
        checkpoints.commit(Position(0, 20), full, {"stage_done": False})
    assert sorted(path.name for path in checkpoints.root.iterdir()) == ["LATEST", "step-000010"]
    assert position(checkpoints.newest()) == Position(0, 10, name="step-000010")


@pytest.fixture
def beside(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Callable[[int], None], Event]]:
    """Begins a checkpoint after so many steps, which is written once the event is set; at 13 the
    disk is full."""
    free = Event()

    def own_shard(engine: object, world: World, copied: bool) -> Callable[[Path], None]:
        assert copied

        def work(path: Path) -> None:
            free.wait(60)
            (full if engine.steps == 13 else write)(path.parent)

        return work

    monkeypatch.setattr(checkpoint, "own_shard", own_shard)
    monkeypatch.setattr(checkpoint, "shapes", lambda engine: {})
    monkeypatch.setattr(checkpoint, "layout", lambda engine, world: [1, 0])
    schedule = SimpleNamespace(last_epoch=0)

    def begin(step: int) -> None:
        engine = SimpleNamespace(lr_scheduler=schedule, skipped_steps=0, steps=step)
        checkpoints.save(Position(0, step), engine, [], {})

    with ThreadPoolExecutor(1) as checkpoints.beside:
        try:
            yield begin, free
        finally:
            free.set()


def test_what_is_written_in_the_background_counts_when_it_is_whole(
    checkpoints: Checkpoints, beside: tuple[Callable[[int], None], Event]
) -> None:
    begin, free = beside
    begin(10)
    # Training goes on; whoever looks finds nothing.
    assert not checkpoints.written and commit.names(checkpoints.root) == []
    checkpoints.best = {"name": "best-000011"}
    free.set()
    checkpoints.settle()
    assert checkpoints.written and commit.latest(checkpoints.root) == "step-000010"
    # It says how things were when it began.
    assert checkpoints.newest()["best"] is None
    checkpoints.settle()
    begin(13)
    with pytest.raises(NotSaved, match="step-000013 cannot be written: process 0: .*No space"):
        checkpoints.settle()
    assert sorted(path.name for path in checkpoints.root.iterdir()) == ["LATEST", "step-000010"]
    checkpoints.settle()
    checkpoints.best = None
    for step in (20, 30):
        begin(step)
        checkpoints.settle()
    assert commit.names(checkpoints.root) == ["step-000030", "step-000020"]


def test_a_shard_is_copied_before_training_goes_on(tmp_path: Path, one_process: None) -> None:
    config = Config()
    config.student.zero_stage = 2
    made = student_engine(
        torch.nn.Linear(8, 8, bias=False), config, lambda o: get_scheduler("constant", o), 1.0
    )

    def step() -> None:
        backward(made, made(torch.ones(2, 8)).square().sum())
        made.step()

    step()
    write_now, write_later = (own_shard(made, ALONE, copied=c) for c in (False, True))
    write_now(tmp_path / "now")
    step()
    write_later(tmp_path / "later")
    now, later = (load_file(tmp_path / name) for name in ("now", "later"))
    assert same(now, later)
    own_shard(made, ALONE, copied=False)(tmp_path / "after")
    after = load_file(tmp_path / "after")
    changed = {key for key in now if not torch.equal(now[key], after[key])}
    assert {key.split(":")[0] for key in changed} == {"weight", "exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_bf16_weights_train_as_fp32_ones_do_from_the_first_step(
    zero_stage: int, one_process: None
) -> None:
    """DeepSpeed would make a step of its own before, of which the weights decay."""
    config = Config()
    config.student.zero_stage, config.optim.weight_decay = zero_stage, 0.1
    moved = []
    for dtype in ("fp32", "bf16"):
        config.student.dtype = dtype
        torch.manual_seed(0)
        matrix = torch.nn.Linear(8, 8, bias=False)
        matrix.weight.data = matrix.weight.data.bfloat16().to(DTYPES[dtype])
        before = matrix.weight.detach().float().clone()
        made = student_engine(matrix, config, lambda o: get_scheduler("constant", o), 0.5)
        backward(made, made(torch.ones(2, 8, dtype=DTYPES[dtype])).float().square().sum())
        made.step()
        moved.append(matrix.weight.detach().float() - before)
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=4e-3)
    assert moved[0].abs().min() > 0.4


def test_processes_settle_once_none_writes_any_more() -> None:
    looked_at = Watch(RunConfig(), ALONE)
    for writes in (True, False):
        looked_at.begin_step(1, 2, writes)
        looked_at.sum_flags(looked_at.flags())
        looked_at.after_step(1, 0)
        assert looked_at.written is not writes


def test_the_end_of_a_stage_is_the_start_of_the_next(checkpoints: Checkpoints) -> None:
    checkpoints.commit(Position(0, 10), write, {"stage_done": True})
    at = position(checkpoints.newest())
    assert at == Position(1, 0, 10, start="step-000010")
    checkpoints.commit(Position(1, 3, 10, "step-000010"), write, {"stage_done": False})
    at = position(checkpoints.newest())
    assert at == Position(1, 3, 10, "step-000010", "step-000013") and at.done == 13
    # Without what its stage started from it cannot be gone on with, nor can anything else here.
    (checkpoints.root / "step-000010" / "rank-00000.safetensors").unlink()
    with pytest.raises(UserError, match="step-000010, which its stage started from: .*missing"):
        checkpoints.newest()


def test_steps_in_a_row_that_are_skipped_stop_a_run() -> None:
    looked_at = Watch(RunConfig(max_skipped=3), ALONE)
    looked_at.begin_stage(skipped=5)
    for done, skipped in enumerate([5, 6, 7, 7, 8, 9], start=1):
        looked_at.sum_flags(looked_at.flags())
        looked_at.after_step(done, skipped)
    looked_at.sum_flags(looked_at.flags())
    with pytest.raises(Diverged):
        looked_at.after_step(7, 10)


def test_minutes_and_steps_decide_when_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    looked_at = Watch(RunConfig(checkpoint_every=5, checkpoint_minutes=1), ALONE)
    saved = []
    for done in range(1, 13):
        now += 11
        looked_at.sum_flags(looked_at.flags())
        looked_at.after_step(done, 0)
        if looked_at.time_to_save:
            saved.append(done)
            looked_at.has_saved()
    assert saved == [5, 10] and not looked_at.stop
    looked_at = Watch(RunConfig(checkpoint_minutes=1), ALONE)
    now += 61
    # What another process asks for arrives in the sum.
    looked_at.sum_flags(looked_at.flags() + torch.tensor([1, 0, 0, 0]))
    looked_at.after_step(1, 0)
    assert looked_at.stop and looked_at.time_to_save


def test_a_second_signal_ends_a_process_and_an_echo_does_not() -> None:
    program = (
        "import signal, sys, time\n"
        "from mlkd_dist.processes import signals\n"
        "signals.SAME_SIGNAL = 4\n"
        "signals.SIGNALLED.install()\n"
        "with signals.SIGNALLED.deferred():\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.05)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        time.sleep(8)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()


def test_outside_training_there_is_nothing_to_wait_for() -> None:
    assert not Signals().came
    if (child := os.fork()) == 0:
        signals = Signals()
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75


def test_a_folder_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "on_first", lambda world, work: work())
    folder = tmp_path / "run"
    with run.alone(folder, ALONE):
        (folder / "config.yaml").write_text("")
        with pytest.raises(UserError, match="another program is at work"):
            with run.alone(folder, ALONE):
                raise AssertionError
    with run.alone(folder, ALONE):
        pass
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    # A run that is refused leaves no folder behind.
    with run.alone(tmp_path / "other", ALONE):
        pass
    assert not (tmp_path / "other").exists()
