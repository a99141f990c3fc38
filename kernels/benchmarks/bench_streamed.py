"""Times and memory of the streamed backend against eager, forward and backward.

    python kernels/benchmarks/bench_streamed.py [--cases CASE ...] [--compile] [--threads N]

An operation that differs from float64 is refused before it is timed. Every row goes to
results/bench_streamed.csv beside this file.
"""

import argparse
import csv
import datetime
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from shapes import CHECKED_HEADS, CHECKED_RELATION, HEADS, RELATIONS, Heads, Relation
from torch import Tensor
from torch.utils.benchmark import Timer

from mlkd_kernels import linear_divergence, relation_kl

RESULTS = Path(__file__).parent / "results" / "bench_streamed.csv"
CASES = {
    **{f"relation:{name}": shape for name, shape in RELATIONS.items()},
    **{f"heads:{name}": shape for name, shape in HEADS.items()},
}


def inputs(shape: Relation | Heads, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What gets gradients first, then the teacher's."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if isinstance(shape, Relation):
        tokens = shape.batch, shape.length
        student = randn(*tokens, shape.heads * shape.student_width)
        return [student.requires_grad_(), randn(*tokens, shape.heads * shape.teacher_width)]
    # Logits of a spread of about 2, as early in training.
    widths = shape.student_width, shape.teacher_width
    pairs = [(randn(shape.rows, w), 2 * randn(shape.vocabulary, w) / w**0.5) for w in widths]
    return [*(x.requires_grad_() for x in pairs[0]), *pairs[1]]


def operation(shape: Relation | Heads, backend: str) -> Callable[..., Tensor]:
    if isinstance(shape, Relation):
        options = {"heads": shape.heads, "causal": shape.causal, "backend": backend}
        return lambda *given: relation_kl(*given, **options).mean()
    options = {"kind": shape.kind, "backend": backend}
    return lambda *given: linear_divergence(*given, **options) / shape.rows


def run(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """The value and the gradients."""
    value = function(*given)
    return [value.detach(), *torch.autograd.grad(value, [x for x in given if x.requires_grad])]


def check(shape: Relation | Heads) -> None:
    """Refuses to go on where the operation is wrong at a size of which float64 is affordable."""
    if isinstance(shape, Relation):
        shape = CHECKED_RELATION._replace(causal=shape.causal)
    else:
        shape = CHECKED_HEADS._replace(kind=shape.kind)
    given = inputs(shape)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    expected = run(operation(shape, "eager"), wide)
    for backend in ("eager", "streamed"):
        for one, other in zip(run(operation(shape, backend), given), expected, strict=True):
            error = ((one - other).norm() / other.norm()).item()
            if not error < 1e-4:
                raise SystemExit(f"{backend} of {shape} is wrong: relative error {error:.1e}.")


def median_ms(function: Callable[..., Tensor], given: list[Tensor], seconds: float) -> float:
    scope = {"run": run, "function": function, "given": given}
    timer = Timer("run(function, given)", globals=scope, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def extra_mib(case: str, backend: str) -> float:
    """The peak of a fresh process that runs the case once, above what holds its inputs."""
    command = [sys.executable, __file__, "--peak-of", case, "--backend", backend]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_peak(case: str, backend: str) -> None:
    shape = CASES[case]
    small = tiny(shape)
    # The libraries' own buffers are no part of an operation: a tiny one makes them first.
    run(operation(small, backend), inputs(small))
    given = inputs(shape)
    # What was reached while importing would hide a small peak.
    Path("/proc/self/clear_refs").write_text("5")
    held = peak_mib()
    run(operation(shape, backend), given)
    print(peak_mib() - held)


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def tiny(shape: Relation | Heads) -> Relation | Heads:
    if isinstance(shape, Relation):
        return CHECKED_RELATION._replace(length=8)
    return CHECKED_HEADS._replace(rows=8)


def machine() -> dict[str, str | int]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    triton = importlib.util.find_spec("triton")
    return {
        "date": datetime.date.today().isoformat(),
        "device": model,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if triton else "none",
        "threads": torch.get_num_threads(),
    }


def measure(case: str, compiled: bool, seconds: float) -> Iterator[dict[str, str | float]]:
    shape = CASES[case]
    check(shape)
    given = inputs(shape)
    functions = {backend: operation(shape, backend) for backend in ("eager", "streamed")}
    if compiled:
        functions["compiled eager"] = torch.compile(operation(shape, "eager"))
    for backend, function in functions.items():
        memory = "" if backend == "compiled eager" else round(extra_mib(case, backend), 1)
        ms = round(median_ms(function, given, seconds), 2)
        yield {"case": case, "shape": str(tuple(shape)), "backend": backend, "ms": ms} | {
            "extra_peak_mib": memory
        }


def write(rows: list[dict[str, str | float]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of eager")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, per row")
    parser.add_argument("--peak-of", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="none", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options.peak_of, options.backend)
        return
    for case in options.cases:
        rows = [machine() | row for row in measure(case, options.compile, options.seconds)]
        write(rows)
        eager, streamed = rows[:2]
        print(
            f"{case}: {eager['ms']} ms eager, {eager['ms'] / streamed['ms']:.2f} times as fast "
            f"streamed; extra memory {eager['extra_peak_mib']} MiB eager, "
            f"{streamed['extra_peak_mib']} MiB streamed"
        )


if __name__ == "__main__":
    main()
