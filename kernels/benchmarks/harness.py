"""The command line that every bench_<op>.py shares: check, measure, write a row."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
import results
import roofs
import torch
from operation import DTYPES, Given, Operation, Way, Wrong, check
from shapes import SHAPES, Shape, described, tiny

FORWARD, BOTH = "forward", "forward+backward"
REFUSED, FAILED = "refused", "failed"
# Exit statuses: ended by its budget, goes on with --resume; and ended, but something is wrong.
UNFINISHED, FAULTS = 75, 3
Options = argparse.Namespace


def main(*operations: Operation) -> None:
    options = arguments(operations)
    torch.set_num_threads(options.threads)
    # fp32 is fp32: tf32 would spoil the difference of two scores.
    torch.set_float32_matmul_precision("highest")
    if options.peak_of:
        name, *rest = options.peak_of
        print_peak(next(each for each in operations if each.name == name), options, *rest)
        return
    done = set(results.latest(results.of_this_commit(options.out))) if options.resume else set()
    try:
        for operation in operations:
            for row in measured(operation, options, done):
                results.append(options.out, [row])
                print(line(row), flush=True)
    except Wrong as error:
        sys.exit(str(error))


def measured(operation: Operation, options: Options, done: set) -> Iterator[results.Row]:
    """A row for each case, dtype, way and direction, but those that are done."""
    wanted = [name for name in options.cases or SHAPES[operation.name][options.device]
              if name in operation.cases]  # fmt: skip
    for case in wanted:
        shape = shape_of(operation, case, options)
        for dtype in options.dtypes:
            for name in operation.ways(shape, DTYPES[dtype], options.device):
                base = results.machine(options.device) | {
                    "op": operation.name,
                    "case": case,
                    "shape": described(shape),
                    "dtype": dtype,
                    "backend": name,
                }
                rows = [base | {"direction": direction} for direction in options.directions]
                rows = [row for row in rows if results.key(row) not in done]
                if not rows or (options.backends and name not in options.backends):
                    continue
                if time.monotonic() > options.end:
                    sys.exit(UNFINISHED)
                yield from rows_of(operation, shape, rows, options)


def rows_of(
    operation: Operation, shape: Shape, rows: list[results.Row], options: Options
) -> Iterator[results.Row]:
    """The rows, of one way, with what was found. One that is wrong, or that breaks, is written
    down and ends the run: after some errors a device computes no more."""
    name, dtype = rows[0]["backend"], rows[0]["dtype"]
    try:
        found = check(operation, shape, name, dtype, options.device)
        if found is None:
            print(line(rows[0] | {"ms_p50": "no kernel for this"}), file=sys.stderr)
            return
        accuracy = {f"{of}_error": f"{found[i]:.1e}" for i, of in enumerate(("value", "gradient"))}
        peaks = fresh_peaks(rows[0], options) if options.device == "cpu" else {}
        way = operation.ways(shape, DTYPES[dtype], options.device)[name]
        given = None
        for row in rows:
            row |= accuracy | peaks.get(row["direction"], {})
            if row.get("extra_peak_mib") != measure.OOM:
                given = given or operation.given(shape, DTYPES[dtype], options.device)
                row |= timed(operation, shape, calls(way, given)[row["direction"]], row, options)
            else:
                row["ms_p50"] = measure.OOM
            yield row
    except Exception as error:
        word = REFUSED if isinstance(error, Wrong) else FAILED
        yield from (row | {"ms_p50": word} for row in rows if "ms_p50" not in row)
        raise


def timed(
    operation: Operation,
    shape: Shape,
    call: Callable[[], object],
    row: results.Row,
    options: Options,
) -> results.Row:
    found: results.Row = {}
    try:
        if options.device == "cuda":
            call()
            found["allowed_mib"] = round(measure.cuda_allowed_mib())
            found["extra_peak_mib"] = round(measure.cuda_extra_mib(call), 1)
        times = measure.times(call, options.device, options.seconds)
    except Exception as error:
        if not measure.out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return found | {"ms_p50": measure.OOM, "extra_peak_mib": measure.OOM}
    dtype = DTYPES[row["dtype"]]
    parts = operation.work(shape, dtype.itemsize)[: 1 if row["direction"] == FORWARD else 2]
    return found | times.row() | roofs.rates(parts, times.p50 / 1e3, dtype, row["device"])


def calls(way: Way, given: Given) -> dict[str, Callable[[], object]]:
    own, other = given

    @torch.no_grad()
    def forward() -> None:
        way.function(*own, *other)

    def both() -> None:
        value = way.function(*own, *other)
        torch.autograd.grad(value, own, torch.ones_like(value))

    return {FORWARD: forward, BOTH: both}


def fresh_peaks(row: results.Row, options: Options) -> dict[str, results.Row]:
    """Direction -> memory on a CPU, in a process that does nothing else."""
    if not options.memory:
        return {}
    allowed = options.memory_mib or measure.cpu_allowed_mib()
    words = measure.in_fresh_process(
        sys.argv[0],
        *("--peak-of", row["op"], row["case"], row["backend"], row["dtype"]),
        *("--device", "cpu", "--threads", str(options.threads), "--memory-mib", str(allowed)),
        *(["--tiny"] if options.tiny else []),
    )
    return {
        direction: {"extra_peak_mib": peak, "allowed_mib": round(allowed)}
        for direction, peak in zip((FORWARD, BOTH), words, strict=True)
    }


def print_peak(operation: Operation, options: Options, case: str, name: str, dtype: str) -> None:
    shape, kind = shape_of(operation, case, options), DTYPES[dtype]
    # The libraries' own buffers are no part of an operation: a tiny one makes them first.
    small = tiny(shape)
    way = operation.ways(small, kind, "cpu")[name]
    for call in calls(way, operation.given(small, kind, "cpu")).values():
        call()
    given, way = operation.given(shape, kind, "cpu"), operation.ways(shape, kind, "cpu")[name]
    measure.limit_memory(options.memory_mib)
    for call in calls(way, given).values():
        try:
            if way.compiles:
                call()
            print(round(measure.cpu_extra_mib(call), 1))
        except Exception as error:
            if not measure.out_of_memory(error):
                raise
            print(measure.OOM)


def shape_of(operation: Operation, case: str, options: Options) -> Shape:
    shape = operation.cases[case]
    return tiny(shape) if options.tiny else shape


def line(row: results.Row) -> str:
    ms = row["ms_p50"]
    words = [row[name] for name in ("op", "case", "dtype", "backend", "direction")]
    words.append(f"{ms} ms" if ms[0].isdigit() else ms)
    if row.get("extra_peak_mib", "") not in ("", measure.OOM):
        words.append(f"{row['extra_peak_mib']} MiB more")
    if row.get("gradient_error"):
        words.append(f"gradient off by {row['gradient_error']}")
    return ", ".join(words)


def arguments(operations: tuple[Operation, ...]) -> Options:
    names = ", ".join(each.name for each in operations)
    parser = argparse.ArgumentParser(
        description=f"Measure {names}: each way is checked against float64 first, and each row "
        "goes to a CSV."
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    cases = dict.fromkeys(name for each in operations for name in each.cases)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=here)
    add("--cases", nargs="+", choices=cases, metavar="CASE", help=", ".join(cases))
    add("--backends", nargs="+", metavar="NAME", help="default: all that can run")
    add("--dtypes", nargs="+", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    add("--directions", nargs="+", choices=(FORWARD, BOTH), default=[FORWARD, BOTH])
    add("--seconds", type=float, default=1.0, help="of timing, per row")
    add("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    add("--memory-mib", type=float, help="what a way may take of a CPU's; default: 60%% of free")
    add("--no-memory", dest="memory", action="store_false", help="leave out a CPU's memory")
    add("--out", type=Path, help="the CSV to append to; default: results/<device>-<date>.csv")
    add("--resume", action="store_true", help="leave out what the CSV has of this commit")
    add("--budget", type=float, default=1e9, help="seconds after which no measurement begins")
    add("--tiny", action="store_true", help="every case at a size that only tries the code")
    add("--peak-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or results.default_path(options.device)
    options.dtypes = options.dtypes or ["bf16" if options.device == "cuda" else "fp32"]
    options.end = time.monotonic() + options.budget
    return options
