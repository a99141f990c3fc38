"""Every Triton kernel against float64 of the same inputs, where plain PyTorch in fp32 stands too.

    python kernels/benchmarks/parity.py [--device cuda] [--out parity.csv] [--resume]

The hard cases: scores of a standard deviation of 3, 10 and 30, students that are their teacher but
for 3 %, padding in the middle and at both ends. A second run must give the same bits. Ends with 1
where a kernel is wrong. On a CPU it is Triton's interpreter that runs (TRITON_INTERPRET=1), at
sizes that only try the code, and without bf16, whose products it gets wrong.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import results
import torch
from harness import FAILED, FAULTS, UNFINISHED
from operation import DTYPES, errors, is_refusal, run
from parity_cases import GPU, INTERPRETER, Case, cases
from torch import Tensor

SPREADS = (1.0, 3.0, 10.0, 30.0)
# What a kernel may add to twice the error of fp32 scores: in 16 bit it rounds the gradient of the
# scores before it multiplies by the student's rows, and the gradient itself.
FLOORS = {"fp32": (1e-5, 1e-5), "fp16": (1e-5, 3e-4), "bf16": (1e-5, 1e-3)}
# Never more, where the divergence is above SMALL_VALUE.
CAPS = {"fp32": (1e-4, 1e-3), "fp16": (1e-4, 2e-3), "bf16": (1e-4, 5e-3)}
SMALL_VALUE = 1e-3
EPSILON = torch.finfo(torch.float32).eps
ABSENT = "no kernel"
GOOD = ("ok", ABSENT)
COLUMNS = (
    *("date", "commit", "device", "threads", "torch", "triton"),
    *("op", "case", "spread", "student", "dtype", "value"),
    *("value_error", "gradient_error", "fp32_value_error", "fp32_gradient_error"),
    *("repeatable", "result", "seconds"),
)
KEY = ("op", "case", "spread", "student", "dtype")


def row_of(place: int, dtype: str, device: str, spreads: tuple[float, ...]) -> results.Row:
    """Of the case at this place: cases cannot be sent to another process."""
    case, begin = tried(device, spreads)[place], time.monotonic()
    row = identity(case, dtype, device)
    try:
        row |= judged(case, dtype, device)
    except Exception as error:
        row["result"] = ABSENT if is_refusal(error) else f"{FAILED}: {error!r}"[:300]
    return row | {"seconds": f"{time.monotonic() - begin:.1f}"}


def tried(device: str, spreads: tuple[float, ...]) -> list[Case]:
    return list(cases(GPU if device == "cuda" else INTERPRETER, spreads))


def identity(case: Case, dtype: str, device: str) -> results.Row:
    return results.machine(device) | {
        "op": case.op,
        "case": case.name,
        "spread": case.spread,
        "student": "near" if case.near else "far",
        "dtype": dtype,
    }


def judged(case: Case, dtype: str, device: str) -> results.Row:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    own, other = ([x.to(DTYPES[dtype]) for x in group] for group in case.make(draw))
    own = [x.requires_grad_() for x in own]
    found, again = (run(case.function("triton"), (own, other)) for _ in range(2))
    fp32 = run(case.function("eager"), (own, other))
    wide = [x.detach().double().requires_grad_() for x in own], [x.double() for x in other]
    expected = run(case.function("eager"), wide)
    # What the gradient is where student and teacher have nothing in common.
    apart = run(case.function("eager"), (wide[0], [torch.zeros_like(x) for x in wide[1]]))
    mine, best = errors(found, expected), errors(fp32, expected)
    allowed = bounds(best, expected, apart, dtype, case.largest)
    same = all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    words = [
        f"{name} off by {error:.1e}, allowed {most:.1e}"
        for name, error, most in zip(("value", "gradient"), mine, allowed, strict=True)
        if not error <= most
    ]
    words += [] if same else ["not the same bits twice"]
    return {
        "value": f"{expected[0].abs().mean().item():.1e}",
        "value_error": f"{mine[0]:.1e}",
        "gradient_error": f"{mine[1]:.1e}",
        "fp32_value_error": f"{best[0]:.1e}",
        "fp32_gradient_error": f"{best[1]:.1e}",
        "repeatable": same,
        "result": "; ".join(words) or "ok",
    }


def bounds(
    best: tuple[float, float],
    expected: list[Tensor],
    apart: list[Tensor],
    dtype: str,
    largest: float,
) -> list[float]:
    """Relative errors that value and gradient may have."""
    allowed = []
    large = expected[0].abs().mean() > SMALL_VALUE
    for reference, floor, cap in zip(best, FLOORS[dtype], CAPS[dtype], strict=True):
        most = 2 * reference + floor
        allowed.append(min(most, max(cap, reference)) if large else most)
    # A probability is as exact as the score that it is the exponential of.
    size = expected[0].norm() / expected[0].numel() ** 0.5
    allowed[0] += (4 * EPSILON / size).item()
    gradients = zip(apart[1:], expected[1:], strict=True)
    allowed[1] += max(8 * EPSILON * largest * (a.norm() / b.norm()).item() for a, b in gradients)
    return allowed


def main() -> None:
    options = arguments()
    end, device = time.monotonic() + options.budget, options.device
    earlier = results.of_this_commit(options.out) if options.resume else []
    done = {key(row): row["result"] for row in earlier}
    jobs = [
        (place, dtype, device, options.spreads)
        for place, case in enumerate(tried(device, options.spreads))
        for dtype in options.dtypes
        if key(identity(case, dtype, device)) not in done
        and (not options.ops or case.op in options.ops)
    ]
    wrong = sum(result not in GOOD for result in done.values())
    for row in finished(jobs, options.processes, end):
        results.append(options.out, [row], COLUMNS)
        if row["result"] not in GOOD:
            wrong += 1
            print(*key(row), row["result"], flush=True)
        if row["result"].startswith(FAILED):
            # The device may compute no more; another run goes on after this row.
            sys.exit(1)
    print(f"{wrong} of the kernels' results are wrong", flush=True)
    sys.exit(FAULTS if wrong else 0)


def finished(jobs: list[tuple], processes: int, end: float) -> Iterator[results.Row]:
    """The rows as they come: several processes compile at a time. Ends the run with its budget."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)
    waiting, running, done = iter(jobs), set(), 0
    try:
        while True:
            if time.monotonic() > end:
                running = {job for job in running if not job.cancel()}
            else:
                more = itertools.islice(waiting, 2 * processes - len(running))
                running |= {pool.submit(row_of, *job) for job in more}
            if not running:
                break
            ready, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            done += len(ready)
            yield from (job.result() for job in ready)
    finally:
        pool.shutdown(cancel_futures=True)
    if done < len(jobs):
        sys.exit(UNFINISHED)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--ops", nargs="+", help="default: all")
    add("--dtypes", nargs="+", choices=DTYPES, help="default: all that the device computes")
    add("--spreads", nargs="+", type=float, default=SPREADS)
    add("--processes", type=int, help="default: 10 beside a GPU, 1 for the interpreter")
    add("--out", type=Path, default=Path("parity.csv"))
    add("--resume", action="store_true", help="leave out what the CSV has of this commit")
    add("--budget", type=float, default=1e9, help="seconds after which no case begins")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.dtypes = options.dtypes or (["bf16", "fp32", "fp16"] if on_gpu else ["fp32", "fp16"])
    options.processes = options.processes or (10 if on_gpu else 1)
    options.spreads = tuple(options.spreads)
    return options


def key(row: results.Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


if __name__ == "__main__":
    main()
