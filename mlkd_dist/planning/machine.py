"""What one machine can do, for `mlkd doctor`: a check is a function that returns a Finding.

Heavy packages are imported by the checks that need them: where one is missing, the others still
speak.
"""

import fcntl
import os
import resource
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import psutil

from mlkd_dist.config import Config
from mlkd_dist.processes.versions import FLOORS, installed, older

OK, WARN, FAIL = "ok", "warn", "fail"
MIB, GIB = 2**20, 2**30
# Of the file that is written and read to learn how fast a disk is.
PROBE_MIB = 32
TOOLS = ("ssh", "pdsh", "srun", "mpirun")


@dataclass(frozen=True)
class Finding:
    name: str
    state: str
    said: str
    todo: str = ""


@dataclass(frozen=True)
class Asked:
    """What stands behind `mlkd doctor`."""

    config: Config | None = None
    processes: int = 1
    json: str | None = None


def packages(what: Asked) -> Finding:
    here = {name: installed(name) for name in FLOORS}
    said = ", ".join(f"{name} {version or 'missing'}" for name, version in here.items())
    for name, floor in FLOORS.items():
        if here[name] is None or older(here[name], floor):
            return Finding("packages", FAIL, said, f"pip install '{name}>={floor}'")
    return Finding("packages", OK, said)


def devices(what: Asked) -> Finding:
    import torch

    if not torch.cuda.is_available():
        if gpu_driver():
            said = f"there is an NVIDIA driver, but torch {torch.__version__} finds no GPU"
            return Finding("devices", FAIL, said, "install torch for the CUDA of this driver")
        return Finding("devices", OK, "no GPU: runs on the CPU, over gloo")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    kinds = {f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus}
    said = f"{len(gpus)} x {', '.join(sorted(kinds))}, {'with' if bf16 else 'without'} bf16"
    if what.processes > len(gpus):
        return Finding("devices", FAIL, said, f"processes={len(gpus)} at most on this machine")
    config = what.config
    if config and not bf16 and "bf16" in (config.teacher.dtype, config.student.dtype):
        return Finding("devices", FAIL, said, "teacher.dtype=fp16 student.dtype=fp32")
    if len(kinds) > 1:
        return Finding("devices", WARN, said, "use GPUs of one kind: all wait for the slowest")
    return Finding("devices", OK, said)


def gpu_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def kernels(what: Asked) -> Finding:
    import torch

    from mlkd_kernels import backends, choose

    states = backends()
    said = "; ".join(f"{name}: {state}" for name, state in states.items())
    try:
        choose(what.config.kernels if what.config else "auto")
    except ValueError:
        return Finding("kernels", FAIL, said, "kernels=auto")
    if torch.cuda.is_available() and states["triton"] != "available":
        return Finding("kernels", WARN, said, "install triton for this torch; streamed runs now")
    return Finding("kernels", OK, said)


def shared_memory(what: Asked) -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding("shared_memory", FAIL, "there is no /dev/shm", "mount a tmpfs there")
    free = shutil.disk_usage("/dev/shm").free
    said = f"{free / GIB:.1f} GiB free in /dev/shm"
    todo = "docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    # NCCL and the workers of data loaders hand buffers over there; Docker gives 64 MiB.
    if free < 64 * MIB * what.processes:
        return Finding("shared_memory", FAIL, said, todo)
    return Finding("shared_memory", WARN if free < GIB else OK, said, todo if free < GIB else "")


def port(what: Asked) -> Finding:
    number = int(os.environ.get("MASTER_PORT", 29500))
    if "RANK" in os.environ:
        return Finding("port", OK, f"{number} is that of these processes")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            state = FAIL if "MASTER_PORT" in os.environ else WARN
            said = f"{number}, where processes would meet: {error.strerror}"
            return Finding("port", state, said, "set MASTER_PORT to a free one for launch/")
    return Finding("port", OK, f"{number} is free")


def names(what: Asked) -> Finding:
    """That this machine and the first one have addresses."""
    own, said = socket.gethostname(), []
    for name in dict.fromkeys([own, os.environ.get("MASTER_ADDR", own)]):
        try:
            address = socket.getaddrinfo(name, None)[0][4][0]
        except OSError:
            state = FAIL if name == os.environ.get("MASTER_ADDR") else WARN
            todo = "set MASTER_ADDR to an address, or add the name to /etc/hosts or DNS"
            return Finding("names", state, f"the name {name} has no address", todo)
        said.append(f"{name} is {address}")
    return Finding("names", OK, ", ".join(said))


def limits(what: Asked) -> Finding:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    said = f"{'any number of' if files == resource.RLIM_INFINITY else files} open files"
    if files != resource.RLIM_INFINITY and files < 4096:
        return Finding("limits", WARN, said, "ulimit -n 65536: each process opens a socket to each")
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        said += f", {locked // 1024} KiB locked"
        return Finding("limits", WARN, said, "ulimit -l unlimited: InfiniBand pins its buffers")
    return Finding("limits", OK, said)


def processors(what: Asked) -> Finding:
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and not (text := quota.read_text()).startswith("max"):
        most, period = map(int, text.split())
        cores = max(1, min(cores, most // period))
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores // what.processes)))
    wanted = threads * int(os.environ.get("LOCAL_SIZE", what.processes))
    said = f"{cores} cores, {threads} threads per process"
    if wanted > cores:
        todo = f"OMP_NUM_THREADS={max(1, cores * threads // wanted)}, or fewer processes"
        return Finding("processors", WARN, f"{said}, {wanted} in all", todo)
    return Finding("processors", OK, said)


def memory(what: Asked) -> Finding:
    free = psutil.virtual_memory().available
    quota, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if quota.exists() and not (text := quota.read_text()).startswith("max"):
        free = min(free, int(text) - int(used.read_text()))
    said = f"{free / GIB:.1f} GiB free"
    if free < 2 * GIB * what.processes:
        todo = "2 GiB per process go to Python and torch alone: use fewer, or end other programs"
        return Finding("memory", WARN, said, todo)
    return Finding("memory", OK, said)


def run_folder(what: Asked) -> Finding:
    key = "run.dir" if what.config else "this folder"
    return disk("run_folder", Path(what.config.run.dir if what.config else "."), key)


def cache(what: Asked) -> Finding:
    from mlkd_dist.data import cache_folder

    return disk(
        "cache", cache_folder(what.config.data.cache if what.config else None), "data.cache"
    )


def disk(name: str, folder: Path, key: str) -> Finding:
    """Room, speed and locks where `folder` is or will be."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    if not os.access(there, os.W_OK):
        return Finding(name, FAIL, f"{there} cannot be written", f"choose another {key}")
    kind, free = file_system(there), shutil.disk_usage(there).free
    said = f"{there} ({kind}), {free / GIB:.0f} GiB free"
    with tempfile.NamedTemporaryFile(dir=there, prefix=".mlkd-doctor-") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            todo = f"choose {key} on a file system with locks, or mount this one with them"
            return Finding(name, FAIL, f"{said}, no locks ({error.strerror})", todo)
        if free < 2 * GIB:
            return Finding(name, WARN, said, "make room: a checkpoint has 12 bytes per parameter")
        written, read = speeds(file)
    said += f", writes {written:.0f} MiB/s, reads {read:.0f} MiB/s, locks work"
    if min(written, read) < 20:
        return Finding(
            name, WARN, said, f"saving and loading take long there: choose another {key}"
        )
    return Finding(name, OK, said)


def speeds(file: Any) -> tuple[float, float]:
    """MiB per second of writing to the disk and of reading from it."""
    block = os.urandom(MIB)
    begun = time.perf_counter()
    for _ in range(PROBE_MIB):
        file.write(block)
    file.flush()
    os.fsync(file.fileno())
    written = time.perf_counter()
    # Else it is read out of memory.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file.seek(0)
    while file.read(MIB):
        pass
    return PROBE_MIB / (written - begun), PROBE_MIB / (time.perf_counter() - written)


def file_system(folder: Path) -> str:
    """Its kind, such as ext4 or nfs4."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[str(p)] for p in (folder, *folder.parents) if str(p) in mounts), "unknown")


def hub(what: Asked) -> Finding:
    """Whether Hugging Face can be asked, and where what it gave is kept."""
    from huggingface_hub import constants, get_token

    said = f"{constants.HF_HOME}, {'with' if get_token() else 'without'} a token"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", OK, f"{said}; offline, as HF_HUB_OFFLINE says")
    url = urlparse(constants.ENDPOINT)
    if proxy := getproxies().get(url.scheme):
        return Finding("hub", OK, f"{said}; {url.hostname} through {urlparse(proxy).hostname}")
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
    except OSError:
        said += f"; {url.hostname} cannot be reached"
        return Finding("hub", WARN, said, "HF_HUB_OFFLINE=1, and models and data as folders")
    return Finding("hub", OK, f"{said}; {url.hostname} can be reached")


def tools(what: Asked) -> Finding:
    """The commands of other launchers, and the compiler that Triton calls."""
    here = {name: shutil.which(name) is not None for name in TOOLS}
    there, missing = ([n for n, found in here.items() if found is state] for state in (True, False))
    said = f"here: {', '.join(there) or 'none'}; not here: {', '.join(missing) or 'none'}"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")) and gpu_driver():
        return Finding("tools", WARN, said + "; no C compiler", "apt install gcc: Triton calls it")
    return Finding("tools", OK, said)


MACHINE = (
    packages,
    devices,
    kernels,
    processors,
    memory,
    shared_memory,
    limits,
    port,
    names,
    run_folder,
    cache,
    hub,
    tools,
)
