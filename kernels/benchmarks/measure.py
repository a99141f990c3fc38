"""Time and memory of one call: on a GPU by its own events and allocator, on a CPU by torch's timer
and a process of its own."""

import ctypes
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

OOM = "oom"
MIB = 2**20
# What a call may take of a CPU's free memory; the rest belongs to others.
SHARE = 0.6
QUANTILES = (0.2, 0.5, 0.8)


class Times(NamedTuple):
    p20: float  # milliseconds
    p50: float
    p80: float

    def row(self) -> dict[str, str]:
        return {f"ms_{name}": f"{ms:.4g}" for name, ms in self._asdict().items()}


def out_of_memory(error: BaseException) -> bool:
    # A CPU's allocator has no exception of its own.
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def times(function: Callable[[], object], device: str, seconds: float) -> Times:
    if device == "cuda":
        from triton.testing import do_bench

        # Empties L2 before each run; its two limits are milliseconds.
        limits = {"warmup": 200 * seconds, "rep": 1000 * seconds}
        return Times(*do_bench(function, quantiles=QUANTILES, **limits))
    begin = time.perf_counter()
    function()
    # Three runs at least, of what takes longer than it is given.
    wanted = max(seconds, 2.5 * (time.perf_counter() - begin))
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    found = torch.tensor(timer.blocked_autorange(min_run_time=wanted).times)
    return Times(*(found.quantile(torch.tensor(QUANTILES).to(found)) * 1e3).tolist())


def cuda_extra_mib(function: Callable[[], object]) -> float:
    """The most that the call holds above what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / MIB


def cuda_allowed_mib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / MIB


def cpu_extra_mib(function: Callable[[], object]) -> float:
    """As cuda_extra_mib; in a process that has done nothing else of the size."""
    # What earlier calls freed but the C library kept would hide what this one takes, and what was
    # reached while importing would hide a small peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    held = _status("VmHWM")
    function()
    return _status("VmHWM") - held


def limit_memory(mib: float) -> None:
    """From here on this process may take so much more."""
    most = int((_status("VmSize") + mib) * MIB)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def cpu_allowed_mib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return SHARE * available / 1024


def in_fresh_process(script: str, *arguments: str) -> list[str]:
    """The words that the script prints."""
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
