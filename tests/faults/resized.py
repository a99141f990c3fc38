"""Runs that go on with more or fewer processes and another ZeRO stage: the losses of one that never
changed, to 1e-4, and the same rows in every step."""

import json
from typing import Any

from places import Place

from faults import ranks
from faults.work import Figure, Work, case, share

STEPS, CUT = 20, 11
# A global batch of six, which one, two and three processes share out; all within one epoch or two.
BATCH = 6
SIZES = [(2, 1), (2, 3), (1, 2)]
STAGES = [(2, 0), (3, 3), (1, 2)]
CASES = [(*sizes, *stages) for sizes in SIZES for stages in STAGES]
Case = tuple[int, int, int, int]


def measure(work: Work) -> list[Figure]:
    place, cases = work.place("resized"), work.some(CASES, 2)
    start(place, 1, [place.write("whole", config(place, "whole", 1, 0))])
    for size in (1, 2):
        start(
            place,
            size,
            [f"{place.write(named(c), config(place, named(c), size, c[2]))}@{CUT}"
             for c in cases if c[0] == size],
        )  # fmt: skip
    for size in (1, 2, 3):
        start(
            place,
            size,
            [place.write(named(c), config(place, named(c), size, c[3]))
             for c in cases if c[1] == size],
        )  # fmt: skip
    found = [case(place, named(c), lambda c=c: compared(place, c)) for c in cases]
    wanted = f"{len(cases)} of {len(cases)} within 1e-4, the same rows"
    figure = share("resumed with other processes and ZeRO stages", wanted, found)
    worst = max((each.get("worst", 1.0) for each in found), default=1.0)
    figure.measured += f", at most {worst:.1e} apart"
    return [figure]


def start(place: Place, size: int, words: list[str]) -> None:
    if words:
        folder = place.base / "starts"
        found = ranks.run("interrupted with rows", words, folder, size, limit=60.0 * len(words))
        assert found.codes == [0] * size, found.log[-3000:]


def named(case: Case) -> str:
    return "{} processes to {}, ZeRO {} to {}".format(*case)


def config(place: Place, name: str, size: int, stage: int) -> dict[str, Any]:
    found = place.config(name, student__zero_stage=stage)
    # Soft labels soon come so near to 0 that rounding is a large part of them, and so do relations
    # of vectors as short as those of these models, but for a low temperature.
    relation = {"splits": 2, "temperature": 0.05}
    losses = {"hidden_mse": {}, "attention_relation": relation, "hard_labels": {}}
    found["stages"] = [{"name": "one", "steps": STEPS, "losses": losses, "lr": 5e-4}]
    found["run"]["checkpoint_every"], found["log_every"] = 10, 1
    found["batch"] |= {"micro_batch": BATCH // size, "grad_accum": 1}
    return found


def compared(place: Place, case: Case) -> dict[str, Any]:
    name = named(case)
    assert place.said("whole") == place.said(name) == ["done", ""], place.said(name)
    ours, theirs = place.logs(name), place.logs("whole")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [*range(STEPS)]
    keys = [key for key in theirs[0] if key.startswith("loss/")]
    worst = max(
        abs(a[key] - b[key]) / max(abs(b[key]), 1e-6)
        for a, b in zip(ours, theirs, strict=True)
        for key in keys
    )
    before, after = rows(place, name, case[0]), rows(place, name, case[1])
    order = rows(place, "whole", 1)
    same = all(before[step] == order[step] for step in range(CUT - 1))
    same &= all(after[step] == order[step] for step in range(10, STEPS))
    return {"passed": worst <= 1e-4 and same, "worst": worst, "same_rows": same}


def rows(place: Place, name: str, size: int) -> dict[int, list[int]]:
    """Step -> the rows that all processes of that start took."""
    found: dict[int, list[int]] = {}
    for path in (place.base / name).glob(f"rows-{size}-*"):
        for line in path.read_text().splitlines():
            step, taken = json.loads(line)
            found[step] = sorted([*found.get(step, []), *(row for row in taken if row >= 0)])
    return found
