"""`mlkd doctor` on machines that lack something, and between two processes."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, run_config

from mlkd_dist import cli
from mlkd_dist.config import Config, TeacherConfig, UserError, from_mapping
from mlkd_dist.planning import doctor, machine
from mlkd_dist.planning.machine import FAIL, OK, WARN, Asked, Finding
from mlkd_dist.processes.network import free_port
from mlkd_dist.processes.world import World

Usage = namedtuple("Usage", "total used free")
GIB = 2**30
BF16 = Asked(Config(teacher=TeacherConfig(dtype="bf16")))


def refuse(error: Exception) -> Any:
    def refusing(*_: Any, **__: Any) -> None:
        raise error

    return refusing


def gpus(patch: pytest.MonkeyPatch, bf16: bool = True, names: tuple[str, ...] = ("H100",)) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: len(names))
    patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    found = [SimpleNamespace(name=name, total_memory=80 * GIB) for name in names]
    patch.setattr(torch.cuda, "get_device_properties", found.__getitem__)


def no_triton(patch: pytest.MonkeyPatch) -> None:
    gpus(patch)
    states = {"eager": "available", "streamed": "available", "triton": "it is not installed"}
    patch.setattr("mlkd_kernels.backends", lambda: states)
    patch.setattr("mlkd_kernels.choose", lambda _: "streamed")


def room(patch: pytest.MonkeyPatch, free: float) -> None:
    patch.setattr(machine.shutil, "disk_usage", lambda _: Usage(1, 1, int(free * GIB)))


def no_locks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine.fcntl, "flock", refuse(OSError(errno.ENOLCK, "No locks available")))


def old_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "installed", lambda name: "2.9" if name == "torch" else "99")


def driver_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(machine, "gpu_driver", lambda: True)


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "gpu_driver", lambda: True)
    patch.setattr(machine.shutil, "which", lambda _: None)


def no_names(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MASTER_ADDR", "first")
    patch.setattr(socket, "getaddrinfo", refuse(socket.gaierror("unknown")))


def no_hub(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr(machine, "getproxies", dict)
    patch.setattr(socket, "create_connection", refuse(TimeoutError()))


def little_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB))


def few_files(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine.resource, "getrlimit", lambda _: (1024, 1024))


def slow(patch: pytest.MonkeyPatch) -> None:
    room(patch, 100)
    patch.setattr(machine, "speeds", lambda _: (5.0, 900.0))


BAD = {
    "old version": (machine.packages, old_torch, FAIL, "torch 2.9", "pip install 'torch>="),
    "driver without CUDA": (machine.devices, driver_alone, FAIL, "no GPU", "install torch"),
    "no bf16": (machine.devices, lambda p: gpus(p, bf16=False), FAIL, "without bf16", "fp32"),
    "mixed GPUs": (machine.devices, lambda p: gpus(p, names=("A", "B")), WARN, "A 80", "one kind"),
    "no triton": (machine.kernels, no_triton, WARN, "triton: ", "install triton"),
    "tiny /dev/shm": (machine.shared_memory, lambda p: room(p, 0.03), FAIL, "0.0", "--shm-size"),
    "small /dev/shm": (machine.shared_memory, lambda p: room(p, 0.5), WARN, "0.5", "--shm-size"),
    "few open files": (machine.limits, few_files, WARN, "1024 open files", "ulimit -n"),
    "many threads": (
        machine.processors,
        lambda p: p.setenv("OMP_NUM_THREADS", "4096"),
        WARN,
        "4096 threads",
        "OMP_NUM_THREADS=",
    ),
    "little memory": (machine.memory, little_memory, WARN, "1.0 GiB", "2 GiB per process"),
    "no address": (machine.names, no_names, WARN, "has no address", "MASTER_ADDR"),
    "no locks": (machine.run_folder, no_locks, FAIL, "No locks available", "with locks"),
    "full disk": (machine.run_folder, lambda p: room(p, 0.5), WARN, "0 GiB free", "make room"),
    "slow disk": (machine.run_folder, slow, WARN, "writes 5 MiB/s", "take long"),
    "closed folder": (
        machine.run_folder,
        lambda p: p.setattr(machine.os, "access", lambda *_: False),
        FAIL,
        "cannot be written",
        "choose another run.dir",
    ),
    "no hub": (machine.hub, no_hub, WARN, "cannot be reached", "HF_HUB_OFFLINE=1"),
    "no compiler": (machine.tools, no_compiler, WARN, "no C compiler", "gcc"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_machine_lacks_is_said(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, spoil, state, said, todo = BAD[case]
    with monkeypatch.context() as patch:
        # Of a run that asks for nothing but bf16.
        spoil(patch)
        found = check(BF16)
    assert (found.name, found.state) == (check.__name__, state), found
    assert said in found.said and todo in found.todo, found


def test_the_first_machine_must_have_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no.such.machine.invalid")
    assert machine.names(Asked()).state == FAIL


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        found = machine.port(Asked())
    assert found.state == FAIL and "MASTER_PORT" in found.todo
    assert machine.port(Asked()).state == OK


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        gpus(patch)
        assert machine.devices(Asked(processes=1)).state == OK
        found = machine.devices(Asked(processes=2))
    assert found.state == FAIL and "processes=1" in found.todo


def test_a_backend_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("triton runs here")
    found = machine.kernels(Asked(Config(kernels="triton")))
    assert found.state == FAIL and found.todo == "kernels=auto"


def test_a_good_machine_has_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(machine, "speeds", lambda _: (500.0, 900.0))
    room(monkeypatch, 100)
    config = Config()
    config.run.dir = str(tmp_path / "run")
    checks = machine.packages, machine.processors, machine.shared_memory, machine.hub
    for check in (*checks, machine.run_folder):
        found = check(Asked(config))
        assert found.state == OK and not found.todo, found
    # What it writes to learn that is gone.
    assert not list(tmp_path.iterdir())


def test_speeds_are_of_a_real_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        assert all(0 < speed < 1e6 for speed in machine.speeds(file))
    assert (tmp_path / "file").stat().st_size == machine.PROBE_MIB * 2**20


def good(what: Asked) -> Finding:
    return Finding("good", OK, "all of it")


def broken(what: Asked) -> Finding:
    raise RuntimeError("no such\nthing")


@pytest.mark.parametrize("checks, code", [((good,), 0), ((good, broken), 1)])
def test_the_exit_code_says_whether_something_fails(
    checks: tuple,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(doctor, "MACHINE", checks)
    monkeypatch.setattr(sys, "argv", ["mlkd", "doctor", f"json={tmp_path}/found.json"])
    assert cli.main() == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "good", "all", "of", "it"]
    assert (
        lines[1:] == ["fail  broken         RuntimeError: no such thing -> see this error"][:code]
    )
    (process,) = json.loads((tmp_path / "found.json").read_text())["processes"]
    assert [f["state"] for f in process["findings"]] == [OK, FAIL][: code + 1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["proceses=2"], "did you mean 'processes'"),
        (["optim.lr=1"], "without a config"),
        (["processes=0"], "processes: '0' is not allowed"),
        (["json=/no/such/folder/x.json"], "cannot be written"),
        (["no.yaml"], "no such file"),
    ],
)
def test_mistakes_of_the_user_end_it_with_2(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(UserError, match=message):
        doctor.asked(words)
    monkeypatch.setattr(sys, "argv", ["mlkd", "doctor", *words])
    assert cli.main() == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def world(one_process: None) -> World:
    return World(0, 1, 0, torch.device("cpu"))


def test_a_config_is_looked_through(
    tmp_path: Path, teachers: dict, data: dict, world: World
) -> None:
    config = from_mapping(run_config(tmp_path, teachers["classification"], data))
    found = doctor.runnable(Asked(config), world)
    assert (found.state, found.said) == (OK, "a new run, 17 rows to learn from")
    config.teacher.path = str(tmp_path / "none")
    found = doctor.runnable(Asked(config), world)
    assert found.state == FAIL and "none" in found.said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "check, told, state, said",
    [
        (doctor.clocks, [0.0, 60.0], WARN, "60 s apart"),
        (doctor.clocks, [0.0, 0.1], OK, "the same time"),
        (
            doctor.replicas,
            [("a", {"torch": "2.13"}), ("b", {"torch": "2.11"})],
            FAIL,
            "torch is 2.11 in process 1",
        ),
        (doctor.shared_folder, [("a", "held"), ("b", "missing")], FAIL, "b does not see what"),
        (doctor.shared_folder, [("a", "held"), ("b", "free")], WARN, "b does not see a lock"),
    ],
)
def test_machines_that_do_not_fit_together(
    check: Any,
    told: list,
    state: str,
    said: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the others say is put into this process's mouth."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlkd_dist.processes.world.gather_objects", lambda mine: told)
    found = check(Asked(), world)
    assert found.state == state and said in found.said, found
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_reduce_together(tmp_path: Path) -> None:
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [sys.executable, "-m", "mlkd_dist.cli", "doctor", f"json={tmp_path}/found.json"]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    found = json.loads((tmp_path / "found.json").read_text())["processes"]
    first, second = [{f["name"]: f for f in process["findings"]} for process in found]
    # The machine is looked at once.
    assert set(second) == {"replicas", "clocks", "all_reduce", "shared_folder"} < set(first)
    assert {f["state"] for f in second.values()} <= {OK, WARN}, said
    assert "GB/s" in first["all_reduce"]["said"] and "2 processes" in first["replicas"]["said"]
    assert "locks" in first["shared_folder"]["said"]
    assert "all reduce" in said[0][0] and not said[1][0]
    bad = any(f["state"] == FAIL for f in (*first.values(), *second.values()))
    assert [process.returncode for process in started] == [int(bad)] * 2, said
