"""Faults that a run is to survive: it goes on, and ends with the bits of one without faults."""

import json
import re
from pathlib import Path
from random import Random
from typing import Any

from places import Place, digest
from strikes import STEP, Fault
from test_runs import with_bad_rows

from faults import folders, ranks
from faults.kinds import KINDS, Kind
from faults.work import Figure, Work, case, config, share

# Optimizer steps between two checkpoints of these runs.
INTERVAL = 2
KILLED, ASKED = "a kill", "being asked to stop"
KILLED_DAMAGED = "a kill, the newest checkpoint damaged"
# The most of each.
LOST = {KILLED: INTERVAL, KILLED_DAMAGED: 2 * INTERVAL, ASKED: 0}
# The step that is skipped where a loss is not finite.
SKIPPED = (1, 2, 3, 5, 6)


def measure(work: Work) -> list[Figure]:
    place = work.place("survived")
    kinds, cases = work.some(KINDS, 12), []
    for seed in work.seeds:
        ends = {False: whole(place, f"clean-{seed}", seed, [])}
        if any(kind.skipped for kind in kinds):
            step = Random(seed).choice(SKIPPED)
            ends[True] = whole(place, f"skipped-{seed}", seed, [Fault("not finite", STEP, step)])
        for kind in kinds:
            name = f"{kind.name} ({seed})"
            found = case(
                place, name, lambda n=name, k=kind, s=seed, e=ends: survive(place, n, k, s, e)
            )
            cases.append(found | {"kind": kind.name, "seed": seed})
    wanted = f"{len(kinds) * len(work.seeds)} of them, of 24 kinds or more"
    survived = share("faults survived, with the bits of a clean run", wanted, cases)
    survived.measured += f", {len(kinds)} kinds"
    survived.met &= work.quick or len(kinds) >= 24
    return [survived, *lost(cases), noticed(cases)]


def lost(cases: list[dict[str, Any]]) -> list[Figure]:
    figures = []
    for name, limit in LOST.items():
        steps = [c["lost"] for c in cases if c.get("after") == name]
        most = max(steps, default=None)
        met = most is not None and most <= limit
        text = f"at most {limit}, a checkpoint every {INTERVAL}" if limit else "0"
        figures.append(Figure(f"steps lost after {name}", text, f"at most {most}", met))
    return figures


def noticed(cases: list[dict[str, Any]]) -> Figure:
    """The other process of two notices by itself; without a launcher."""
    seconds = [
        c["noticed"] for c in cases if c.get("noticed") is not None and c["codes"][0].count(-9) == 1
    ]
    worst = max(seconds, default=float("inf"))
    return (
        Figure(
            "seconds until a process ends whose peer was killed",
            "5 at most",
            f"{worst:.1f} at most, {sorted(seconds)[len(seconds) // 2]:.1f} in the middle of "
            f"{len(seconds)}",
            worst <= 5,
        )
        if seconds
        else Figure("seconds until a process ends whose peer was killed", "5", "-", False)
    )


def whole(place: Place, name: str, seed: int, faults: list[Fault]) -> str:
    """The end of a run that was not interrupted."""
    path = place.write(name, config(place, name, seed))
    found = ranks.run("distill", [path], place.base / name, 2, faults)
    assert found.codes == [0, 0] and found.struck == 2 * len(faults), found.log[-3000:]
    return digest(place, name)


def survive(place: Place, name: str, kind: Kind, seed: int, ends: dict[bool, str]) -> dict:
    draw = Random(f"{kind.name} {seed}")
    path = place.write(name, settings(place, name, kind, seed))
    faults = kind.strikes(draw) if kind.strikes else []
    if kind.skipped:
        faults = [Fault(f.do, f.at, Random(seed).choice(SKIPPED), f.ranks) for f in faults]
    folder = place.base / name
    starts = [ranks.run("distill", [path], folder, 2, faults, kind.parent)]
    struck = all(
        list((folder / "told-0").glob(f"*-{number}.struck")) for number in range(len(faults))
    )
    as_told = set(starts[0].codes) <= kind.ends
    damage = kind.damage(place.run(name), draw) if kind.damage else None
    again = kind.again(draw) if kind.again else []
    if again:
        starts.append(ranks.run("distill", [path], folder, 2, again))
        struck &= starts[-1].struck > 0 and starts[-1].codes != [0, 0]
    if kind.name == "bad rows":
        report = json.loads((place.run(name) / "report.json").read_text())
        struck = report["bad_rows"] == {"data.train": 2, "data.validation": 2}
    while starts[-1].codes != [0, 0] and len(starts) < 2 + len(again):
        starts.append(ranks.run("distill", [path], folder, 2))
    done = starts[-1].codes == [0, 0]
    same = done and digest(place, name) == ends[kind.skipped]
    if kind.damage is folders.tear_events:
        same &= place.steps_on_the_board(name) == [row["step"] for row in place.logs(name)]
    found = {
        "passed": struck and as_told and same,
        "struck": struck,
        "same_bits": same,
        "codes": [start.codes for start in starts],
        "faults": [[f.do, f.at, f.number, f.ranks, f.only] for f in [*faults, *again]],
        "damage": damage,
        "noticed": None if starts[0].noticed is None else round(starts[0].noticed, 2),
    }
    found |= steps_lost(faults, damage, starts)
    return found if found["passed"] else found | {"log": "".join(s.log[-1500:] for s in starts)}


def steps_lost(
    faults: list[Fault], damage: str | None, starts: list[ranks.Outcome]
) -> dict[str, Any]:
    """Of runs that were killed, or asked to stop, before or within a step."""
    if len(faults) != 1 or faults[0].at != STEP or len(starts) < 2:
        return {}
    resumed = [re.search(r"resuming from step (\d+)", start.log) for start in starts[1:]]
    at = next((int(found[1]) for found in resumed if found), 0)
    (fault,) = faults
    if fault.do == "kill":
        damaged = re.search(r"step-\d+/", damage or "")
        return {"after": KILLED_DAMAGED if damaged else KILLED, "lost": fault.number - at}
    if stopped := re.search(r"stopped after step (\d+)", starts[0].log):
        return {"after": ASKED, "lost": int(stopped[1]) - at}
    return {}


def settings(place: Place, name: str, kind: Kind, seed: int) -> dict:
    found = config(place, name, seed)
    for block, values in kind.change.items():
        found[block] = found.get(block, {}) | values
    if kind.own_cache:
        found["data"]["cache"] = str(place.base / name / "cache")
    if kind.name == "bad rows":
        for key, path in place.data.items():
            found["data"][key] = with_bad_rows(Path(path), place.base / name / f"{key}.jsonl")
    return found
