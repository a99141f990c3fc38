"""One command for a bare machine with a GPU, torch and Triton: is it right, what is best, how fast.

    python kernels/benchmarks/gpu_session.py --out FOLDER [--budget 540] [--earlier FOLDER]

Runs in order parity.py, tune.py and the benchmarks, what matters most first; each writes as it goes
and has a time limit of its own. A call ends within its budget and the next one, with the same
folder or with a copy of it as --earlier, goes on where it ended; what was done at another commit is
done again. `--dry-run` does all of it on a CPU at sizes that only try the code. Ends with 0 when
all is done and right, 75 when there is more to do, and 1 when something is wrong.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
UNFINISHED, FAULTS, CUT = 75, 3, -1
# How long a step may take to end itself, and how little time is not worth a start.
GRACE, LEAST = 15.0, 25.0
# A step that is cut sooner may only have begun something long.
EARLY = 90.0
RECORD = "session.jsonl"
OURS = ("eager", "streamed", "triton", "auto")
OTHERS = ("plain", "attention calls", "liger", "torch linear_cross_entropy")
# It takes minutes to compile a case three times: for some, and after what is ours.
COMPILED = ("compiled", "compiled, 8 chunks")


class Step(NamedTuple):
    name: str
    script: str
    arguments: tuple[str, ...]
    limit: float  # seconds, of one call
    writes: str  # the CSV whose rows are its progress


def benchmark(name: str, op: str, cases: str, limit: float, *more: str) -> Step:
    if "--backends" not in more:
        more = (*more, "--backends", *OURS, *OTHERS)
    arguments = (*(("--cases", *cases.split()) if cases else ()), *more, "--seconds", "0.4")
    return Step(name, f"bench_{op}.py", arguments, limit, "benchmarks.csv")


STEPS = [
    Step("parity", "parity.py", (), 300, "parity.csv"),
    benchmark("K1-a", "relation_kl", "bert-base-to-384 bert-base-to-768 bert-base-4-heads "
              "bert-large-6-layers", 240),
    benchmark("K3-a", "linear_divergence", "llama3-8b-to-8b llama3-8b-to-8b-jsd", 240),
    Step("tiles", "tune.py", ("--sizes", "2"), 400, "tiles.csv"),
    benchmark("K1-c", "relation_kl", "qwen3-queries qwen3-queries-causal qwen3-keys-causal "
              "bert-base-long", 240),
    benchmark("attention", "attention_kl", "", 180),
    benchmark("K3-b", "linear_divergence", "llama3-8b-to-1b llama3-8b-to-1b-reverse "
              "qwen3-8b-to-0.6b llama3-70b-to-8b llama2-7b-to-2048", 300),
    benchmark("K3-d", "linear_divergence", "llama3-256-tokens llama3-1024-tokens", 120),
    benchmark("K1-b, K1-e, K4", "relation_kl", "48-heads wide-heads hidden-512 hidden-2048", 180),
    benchmark("K2", "similarity", "", 240),
    benchmark("K5", "info_nce", "", 180),
    benchmark("K1-d", "relation_kl", "qwen3-queries-8k qwen3-queries-32k", 240),
    *(
        benchmark(f"compiled {op}", op, cases, 240, "--backends", *COMPILED)
        for op, cases in (("relation_kl", "bert-base-to-384 qwen3-queries-causal"),
                          ("linear_divergence", "llama3-8b-to-8b llama3-8b-to-1b"),
                          ("attention_kl", "llama3-causal"),
                          ("similarity", "16k"), ("info_nce", "8k"))
    ),
    benchmark("cross entropy", "linear_divergence", "llama3-cross-entropy", 120),
    *(
        benchmark(f"fp32 {op}", op, cases, 150, "--dtypes", "fp32", "--backends", *OURS)
        for op, cases in (("relation_kl", "bert-base-to-384 hidden-512"),
                          ("attention_kl", "bert-base-to-384"),
                          ("linear_divergence", "llama3-8b-to-1b"))
    ),
    Step("tiles of fp32", "tune.py", ("--sizes", "4"), 200, "tiles.csv"),
]  # fmt: skip


def main() -> None:
    options = arguments()
    end = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    if options.earlier:
        for path in options.earlier.iterdir():
            if path.is_file() and not (options.out / path.name).exists():
                shutil.copy(path, options.out)
    os.environ |= environment(options)
    # After the environment is set: it may name the commit.
    from results import commit

    status = 0
    for step in STEPS:
        if options.only and step.name not in options.only:
            continue
        status = max(status, advanced(step, commit(), end, options), key=(0, 75, 1).index)
    sys.exit(status)


def environment(options: argparse.Namespace) -> dict[str, str]:
    found = {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    return found | ({"TRITON_INTERPRET": "1"} if options.dry_run else {})


def advanced(step: Step, commit: str, end: float, options: argparse.Namespace) -> int:
    """Runs a step until it is done, its time is over, or it breaks twice without a new row."""
    spent = 0.0
    while True:
        earlier = records(step, commit, options.out)
        if earlier and earlier[-1]["status"] in (0, FAULTS):
            print(f"{step.name}: done", flush=True)
            return 1 if earlier[-1]["status"] else 0
        if [each["rows"] for each in earlier[-2:] if broke(each)] == [0, 0]:
            print(f"{step.name}: given up, it breaks without a new row", flush=True)
            return 1
        left = min(step.limit - spent, end - time.monotonic() - GRACE)
        if left < LEAST:
            return UNFINISHED
        rows, begin = count(options.out / step.writes), time.monotonic()
        line = {"step": step.name, "commit": commit, "status": ran(step, left, options)}
        line["seconds"] = round(time.monotonic() - begin, 1)
        line["rows"] = count(options.out / step.writes) - rows
        spent += line["seconds"]
        with (options.out / RECORD).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def records(step: Step, commit: str, folder: Path) -> list[dict]:
    """Its earlier runs at this commit."""
    path = folder / RECORD
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        each
        for each in map(json.loads, lines)
        if (each["step"], each["commit"]) == (step.name, commit)
    ]


def broke(record: dict) -> bool:
    """Ended neither by itself nor by a limit that came too early to mean anything."""
    early = record["status"] == CUT and record["seconds"] < EARLY
    return record["status"] not in (0, FAULTS, UNFINISHED) and not early


def ran(step: Step, seconds: float, options: argparse.Namespace) -> int:
    """The step's exit status; CUT where it had to be ended."""
    command = [sys.executable, str(HERE / step.script), *step.arguments, "--resume"]
    command += ["--budget", f"{seconds:.0f}", "--out"]
    command += [str(options.out if step.script == "tune.py" else options.out / step.writes)]
    command += dry(step) if options.dry_run else ["--device", "cuda"]
    with (options.out / "log.txt").open("a") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(seconds + GRACE - 2)
        except subprocess.TimeoutExpired:
            return CUT
        finally:
            # Of a step that ended by itself too: a worker of its own may have stayed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def dry(step: Step) -> list[str]:
    sizes = {
        "parity.py": ["--spreads", "3", "--dtypes", "fp32"],
        "tune.py": ["--length", "40", "--batch", "1", "--most", "2", "--seconds", "0.001"],
    }
    tiny = ["--tiny", "--no-memory", "--seconds", "0.001"]
    return ["--device", "cpu", *sizes.get(step.script, tiny)]


def count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of all that is written")
    add("--earlier", type=Path, help="folder of an earlier call, which is copied")
    add("--budget", type=float, default=540.0, help="seconds of this call")
    add("--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP",
        help=", ".join(step.name for step in STEPS))  # fmt: skip
    add("--dry-run", action="store_true", help="on a CPU, only to try the code")
    return parser.parse_args()


if __name__ == "__main__":
    main()
