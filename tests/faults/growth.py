"""Memory of a run with both engines, over many steps."""

import json
from pathlib import Path

import psutil

from faults import ranks
from faults.work import Figure, Work

STEPS, WARM = 300, 100
LOSSES = {"hidden_mse": {}, "attention_relation": {"splits": 2}, "soft_labels": {}}


def measure(work: Work) -> list[Figure]:
    """Two processes, the student at ZeRO 2 and at ZeRO 3 beside a teacher at ZeRO 3."""
    place, cases = work.place("growth"), []
    steps = 150 if work.quick else STEPS
    for stage in work.some([2, 3], 1):
        name = f"ZeRO {stage}"
        config = place.config(name, student__zero_stage=stage, teacher__zero_stage=3)
        config["stages"] = [{"name": "one", "steps": steps, "losses": LOSSES}]
        config["run"]["checkpoint_every"], config["log_every"] = 50, 10
        config["batch"] |= {"micro_batch": 1, "grad_accum": 2}
        path = place.write(name, config)
        found = ranks.run("growth", [path], place.base / name, 2, limit=500)
        assert found.codes == [0, 0], found.log[-3000:]
        for rank in range(2):
            held = json.loads(Path(path).with_suffix(f".{rank}").read_text())
            assert len(held) == steps
            begin, end = mean(held[WARM - 20 : WARM]), mean(held[-20:])
            growth = end / begin - 1
            mib = [round(begin / 2**20, 1), round(end / 2**20, 1)]
            cases.append(
                {"case": f"{name}, process {rank}", "passed": growth < 0.01, "growth": growth,
                 "mib": mib, "steps": steps}
            )  # fmt: skip
    worst = max(each["growth"] for each in cases)
    return [
        Figure(
            f"growth of memory from step {WARM} to step {steps}, two engines",
            "less than 1 %",
            f"{100 * worst:.2f} % at most",
            worst < 0.01,
            cases,
        )
    ]


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


def grow(words: list[str]) -> int:
    """The program: a run that writes beside its config what its process holds after each step."""
    import os

    from mlkd_dist import distill, stage

    held, step, process = [], stage.train_step, psutil.Process()

    def measured(*args: object) -> None:
        step(*args)
        held.append(process.memory_info().rss)

    stage.train_step = measured
    code = distill.main(words)
    Path(words[0]).with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(held))
    return code
