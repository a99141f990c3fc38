"""launch/hostfile.sh over real ssh and pdsh, between two hosts that are namespaces of this
machine."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from hosts import PORT, Hosts, why_not
from test_launch import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=f"two hosts: {why_not()}"),
]
FEW = ["stages[0].steps=2", "stages[1].steps=2", "batch.micro_batch=4", "log_every=1"]
FEW += ["data.train_rows=200", "data.validation_fraction=0.003"]
# Seconds, on a machine that has other things to do.
PATIENCE = 2400


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        yield hosts
    finally:
        hosts.end()


def started(
    hosts: Hosts, folder: Path, names: list[str], words: list[str], **more: str
) -> subprocess.Popen:
    """hostfile.sh on node1, with `names` in its hostfile."""
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
    # DeepSpeed carries no folder with a space, such as that of .ci/run, and goes by its real name.
    work = folder / "work"
    work.mkdir()
    (folder / "root").symlink_to(ROOT)
    paths = os.pathsep.join([f"{folder}/root", f"{folder}/root/kernels"])
    given = environment(
        HOSTFILE=folder / "hostfile",
        PYTHON=python(folder),
        PYTHONPATH=paths,
        SSH_PORT=PORT,
        SSH_ARGS=hosts.ssh_args,
        MLKD_CACHE=os.environ.get("MLKD_CACHE", ""),
        OMP_NUM_THREADS=1,
        GRACE=10,
        **more,
    )
    return subprocess.Popen(
        hosts.on(0, "env", f"--chdir={work}", f"{folder}/root/launch/hostfile.sh", *words),
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(folder: Path) -> str:
    """This Python by a name without a space."""
    (folder / "environment").symlink_to(sys.prefix)
    return f"{folder}/environment/bin/{Path(sys.executable).name}"


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_hosts_learn_what_one_does(hosts: Hosts, tmp_path: Path) -> None:
    quickstart = f"{tmp_path}/root/configs/quickstart.yaml"
    # With what a shell on the way could take for its own.
    two = tmp_path / 'a $HOME 50%n\'s "run"'
    words = [quickstart, *FEW, f"run.dir={json.dumps(str(two))}"]
    running = started(hosts, tmp_path, ["node1", "node2"], words)
    out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0, out + err
    assert not hosts.at_work("mlkd_dist")
    one = tmp_path / "one"
    alone = subprocess.run(
        [str(ROOT / "launch" / "local.sh"), quickstart, *FEW, f"run.dir={one}"],
        env=environment(PROCESSES=2, PYTHON=sys.executable, OMP_NUM_THREADS=1),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    assert alone.returncode == 0, alone.stderr
    ours, theirs = logged(two), logged(one)
    assert [line["step"] for line in ours] == [0, 1, 2, 3]
    keys = [key for key in theirs[0] if key.startswith("loss/") or key == "grad_norm"]
    assert "loss/hidden_mse" in keys
    for mine, expected in zip(ours, theirs, strict=True):
        for key in [key for key in expected if key.startswith("loss/") or key == "grad_norm"]:
            assert mine[key] == pytest.approx(expected[key], rel=1e-5), (mine["step"], key)


def test_the_doctor_looks_at_both_hosts(hosts: Hosts, tmp_path: Path) -> None:
    words = [f"{tmp_path}/root/configs/quickstart.yaml", *FEW, f"run.dir={tmp_path}/run"]
    running = started(hosts, tmp_path, ["node1", "node2"], words, COMMAND="doctor")
    out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0, out + err
    # pdsh puts the host before each line.
    lines = dict(re.findall(r"(?:ok|warn) +([a-z ]+?) {2,}(.+)", out))
    assert "2 processes on 2 machines (node1, node2)" in lines["replicas"], out
    assert "ms for 4 B" in lines["all reduce"] and "gloo" in lines["all reduce"]
    assert str(tmp_path) in lines["shared folder"] and "a new run" in lines["runnable"]
    assert not (tmp_path / "run").exists()


def test_a_host_that_is_not_there_is_named(hosts: Hosts, tmp_path: Path) -> None:
    begun = time.monotonic()
    running = started(hosts, tmp_path, ["node1", "nobody"], ["mine.yaml"])
    out, err = running.communicate(timeout=PATIENCE)
    assert time.monotonic() - begun < 60
    (line,) = err.splitlines()
    assert running.returncode == 2 and "ssh to nobody does not work" in line and not out
    assert not hosts.at_work("deepspeed")


def test_a_port_that_is_taken_is_named(hosts: Hosts, tmp_path: Path) -> None:
    listen = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(1e6)"
    other = subprocess.Popen(hosts.on(0, sys.executable, "-c", listen))
    try:
        until = time.monotonic() + 60
        while b":29500" not in subprocess.check_output(hosts.on(0, "ss", "-ltn")):
            assert time.monotonic() < until
            time.sleep(0.2)
        running = started(hosts, tmp_path, ["node1", "node2"], ["mine.yaml"])
        out, err = running.communicate(timeout=PATIENCE)
    finally:
        # What nsenter has started is no child of this process.
        for process in hosts.at_work("create_server"):
            process.kill()
        other.wait()
    (line,) = err.splitlines()
    assert running.returncode == 2 and "node1 has a program at port 29500" in line and not out


def losses(lines: list[dict]) -> list[dict]:
    return [{key: row[key] for key in row if key.startswith("loss/")} for row in lines]


def test_a_host_that_is_cut_off_ends_all_and_the_run_goes_on_after(
    hosts: Hosts, tmp_path: Path
) -> None:
    folder, timeout = tmp_path / "run", 60
    words = [f"{tmp_path}/root/configs/quickstart.yaml", *FEW, f"run.dir={folder}"]
    words += ["stages[0].steps=40", "run.checkpoint_every=10", f"launch.timeout={timeout}"]
    running = started(hosts, tmp_path, ["node1", "node2"], words)
    try:
        until = time.monotonic() + PATIENCE
        # Some steps after the first checkpoint.
        while not (folder / "metrics.jsonl").exists() or len(logged(folder)) < 12:
            assert running.poll() is None and time.monotonic() < until, running.communicate()
            time.sleep(0.2)
        with hosts.cut_off():
            begun = time.monotonic()
            out, err = running.communicate(timeout=PATIENCE)
            took = time.monotonic() - begun
            # On the host that nobody reaches they end by themselves.
            while left := hosts.at_work("mlkd_dist.distill"):
                assert time.monotonic() - begun < timeout + 90, left
                time.sleep(0.5)
    finally:
        running.kill()
    assert running.returncode not in (0, 2, 75), err
    assert "hostfile.sh: error: the connection to node2 broke off." in err, err
    # ssh gives up after 30 s; GRACE; one ssh that does not answer.
    assert took < 120
    before = logged(folder)
    saved = int(sorted(path.name for path in (folder / "checkpoints").glob("step-*"))[-1][5:])
    assert 10 <= saved < len(before) <= 40
    (tmp_path / "again").mkdir()
    again = started(hosts, tmp_path / "again", ["node1", "node2"], words)
    out, err = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, out + err
    assert f"resuming from step {saved}" in out + err, out + err
    after = logged(folder)
    assert [line["step"] for line in after] == list(range(42))
    # What was trained between the checkpoint and the end is trained once more.
    assert losses(after[: len(before)]) == losses(before)
