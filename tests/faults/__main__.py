"""Measures, writes the results after each group, prints the table; exit code 1 where a figure is
missed. `make faults` for all, QUICK=1 for some of each, OUT=FILE for the results, ONLY=GROUP,...

A group that the results file has, of this very code, is not measured again; with ONLY it is.
"""

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

# The processes of the cases are told nothing of a GPU, and each has one thread.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

GROUPS = ("survived", "torn", "damaged", "resumed", "resized", "unsafe", "refused", "noticed")
GROUPS += ("growth", "cost")


def main() -> int:
    from faults.results import Results, table
    from faults.work import Work

    quick = bool(os.environ.get("QUICK"))
    place = "runs/faults-quick.json" if quick else "tests/faults/results.json"
    results = Results(Path(os.environ.get("OUT") or place), quick)
    only = [name for name in os.environ.get("ONLY", "").split(",") if name]
    assert set(only) <= set(GROUPS), f"ONLY: {only}; there are {GROUPS}"
    base = Path(mkdtemp(prefix="mlkd-faults-"))
    print(f"cases run in {base}; those that fail stay there", flush=True)
    work = Work(base, quick)
    for name in only or [name for name in GROUPS if name not in results.groups]:
        print(f"{name}:", flush=True)
        begun = time.monotonic()
        figures = import_module(f"faults.{name}").measure(work)
        results.add(name, figures, time.monotonic() - begun)
    print(table(results))
    return int(not results.met())


if __name__ == "__main__":
    sys.exit(main())
