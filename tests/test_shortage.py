"""What a person is told who has run out of memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_config

from mlkd_dist import config as configs
from mlkd_dist.config import Config
from mlkd_dist.planning.cluster import Cluster, room
from mlkd_dist.planning.estimate import Choice, estimate
from mlkd_dist.planning.model_sizes import models_of
from mlkd_dist.planning.shortage import advice, is_shortage
from mlkd_dist.processes.signals import VERDICTS, is_first_with


@pytest.fixture
def config(tmp_path: Path, teachers: dict, data: dict) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path, teachers["classification"], data)))
    return configs.load(str(path), ["batch.micro_batch=64"])


def test_what_is_proposed_fits_by_the_plan_and_is_the_same_batch(
    config: Config, tmp_path: Path
) -> None:
    models = models_of(config)
    now = Choice(0, "world", 0, "none", False)
    needs = estimate(config, models, Cluster(1, 2), now, 64).total / 2**30
    cluster = Cluster(1, 2, gpu_memory=needs / 2, reserve=0)
    told = advice(config, cluster, gpu=False)
    assert told.startswith("by `mlkd plan` this fits: ") and "offload" not in told
    words = told.partition(": ")[2].split()
    better = configs.load(str(tmp_path / "config.yaml"), words)
    assert better.batch.micro_batch * better.batch.grad_accum == 64
    choice = Choice(
        better.teacher.zero_stage,
        better.teacher.shard_group,
        better.student.zero_stage,
        "none",
        better.student.activation_checkpointing != "none",
    )
    assert estimate(better, models, cluster, choice, better.batch.micro_batch).total < room(cluster)
    # What should have fitted did not: then less, whatever the plan says.
    large = Cluster(1, 1, gpu_memory=1000)
    assert advice(config, large, gpu=False) == (
        "take less at a time, such as batch.micro_batch=32 batch.grad_accum=2"
    )
    config.batch.micro_batch = 1
    assert "lower data.max_length" in advice(config, large, gpu=False)
    tiny = Cluster(1, 1, gpu_memory=1e-6, reserve=0)
    assert "nothing fits there" in advice(config, tiny, gpu=True)


def test_one_of_many_processes_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_first_with("shortage") and is_first_with("shortage")
    monkeypatch.setenv(VERDICTS, str(tmp_path))
    assert is_first_with("shortage") and not is_first_with("shortage")


def test_other_errors_are_no_shortage() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**58)
    assert is_shortage(found.value) and is_shortage(MemoryError())
    assert is_shortage(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_shortage(RuntimeError("shapes differ")) and not is_shortage(OSError(12, ""))


def test_a_run_that_is_short_of_memory_says_what_would_fit(config: Config, tmp_path: Path) -> None:
    words = [str(tmp_path / "config.yaml"), "batch.micro_batch=1024"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "short_of_memory.py"), "300", *words],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("mlkd: error: process 0 ran out of memory, the ")
    assert line.endswith(
        "GiB of its share of the machine: take less at a time, such as batch.micro_batch=512 "
        "batch.grad_accum=2"
    )
