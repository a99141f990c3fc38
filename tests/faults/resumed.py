"""Runs that go on, once and twice, on the same layout: the same bits of the student, and of all
that a later checkpoint holds."""

import json
from itertools import product
from pathlib import Path
from typing import Any

from places import Place, digest

from faults import ranks
from faults.work import Figure, Work, case, share

STEPS = 8
LOSSES = {"hidden_mse": {}, "attention_relation": {"splits": 2}, "soft_labels": {}}
# Ended before these optimizer steps; a checkpoint follows the last of them, with Adam's moments.
CUTS = {1: [3], 2: [3, 5]}
LATER = "step-000006"


def measure(work: Work) -> list[Figure]:
    place, cases = work.place("resumed"), []
    layouts = work.some(list(product((0, 1, 2, 3), ("fp32", "bf16"), (1, 4))), 3)
    for stage in sorted({stage for stage, _, _ in layouts}):
        of_stage = [layout for layout in layouts if layout[0] == stage]
        words = [word for layout in of_stage for word in written(place, layout)]
        folder = place.base / f"stage {stage}"
        found = ranks.run("interrupted", words, folder, 2, limit=60.0 * len(words))
        for layout, resumes in product(of_stage, CUTS):
            name = f"{named(layout)}, {resumes} times"
            log = "" if found.codes == [0, 0] else found.log[-2000:]
            cases.append(
                case(place, name, lambda a=layout, r=resumes, t=log: compared(place, a, r, t))
            )
    wanted = f"{len(cases)} of {len(cases)}; fp16 is not offered"
    return [share("resumed with the same bits: ZeRO x type x accumulation", wanted, cases)]


def named(layout: tuple[int, str, int]) -> str:
    stage, dtype, accumulation = layout
    return f"ZeRO {stage} {dtype} accumulation {accumulation}"


def written(place: Place, layout: tuple[int, str, int]) -> list[str]:
    """The runs of a layout: whole, resumed once, resumed twice."""
    stage, dtype, accumulation = layout
    words = []
    for resumes, cuts in {0: [], **CUTS}.items():
        name = f"{named(layout)} {resumes}"
        config = place.config(name, student__zero_stage=stage, student__dropout=True)
        config["student"]["dtype"] = dtype
        config["stages"] = [{"name": "one", "steps": STEPS, "losses": LOSSES}]
        config["batch"] |= {"micro_batch": 1, "grad_accum": accumulation}
        path = place.write(name, config)
        words += [*(f"{path}@{step}" for step in cuts), path]
    return words


def compared(place: Place, layout: tuple, resumes: int, log: str) -> dict[str, Any]:
    whole, resumed = (f"{named(layout)} {number}" for number in (0, resumes))
    if log:
        return {"passed": False, "error": log}
    assert place.said(whole) == place.said(resumed) == ["done", ""]
    ends = digest(place, whole) == digest(place, resumed)
    later = hashes(place.run(whole)) == hashes(place.run(resumed))
    return {"passed": ends and later, "student": ends, "checkpoint": later}


def hashes(run: Path) -> dict[str, Any]:
    """Of weights, moments, counters and random states, by process."""
    text = (run / "checkpoints" / LATER / "manifest.json").read_text().splitlines()[0]
    files = json.loads(text)["files"]
    assert len(files) == 2
    return files
