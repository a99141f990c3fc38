"""The same update however a step is spread: processes, micro-batches, ZeRO stages, sharded or whole
teacher."""

from pathlib import Path

import pytest
from conftest import launch, logged, run_config

# (processes, micro_batch, grad_accum), all with a global batch of 4. With two processes the last
# batch of the 17 rows leaves the second one without a row that counts.
LAYOUTS = [(1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2)]
STAGES = [(student, teacher) for student in (0, 1, 2, 3) for teacher in (0, 3)]
# Module by module: a factorised student, in its own forward pass and on the teacher's inputs.
MODULES = [
    {
        "name": "own",
        "steps": 2,
        "losses": {"module_mse": {}, "hidden_mse": {}, "attention_relation": {"splits": 2}},
    },
    {
        "name": "teacher",
        "steps": 3,
        "losses": {"module_mse": {"input": "teacher", "average": "token"}, "soft_labels": {}},
    },
]


@pytest.fixture(scope="module", params=["classification", "masked_lm", "embedding", "modules"])
def losses_of_all(request, tmp_path_factory, teachers, data) -> dict[tuple, list[dict]]:
    """The logged steps of every layout; every pair of ZeRO stages for one task, the extremes for
    the others."""
    kind, found = request.param, {}
    task = "classification" if kind == "modules" else kind
    stages = STAGES if kind == "classification" else [(0, 0), (3, 3)]
    base: Path = tmp_path_factory.mktemp(kind)
    for processes in (1, 2):
        configs = {}
        for layout in LAYOUTS:
            for stage in stages:
                if layout[0] != processes or (processes == 1 and stage[0] in (1, 2)):
                    continue
                # Other stages than these are compared in test_runs.py.
                if kind == "modules" and stage != (3 * (processes - 1),) * 2:
                    continue
                folder = base / "-".join(map(str, (*layout, *stage)))
                folder.mkdir()
                config = run_config(folder, teachers[task], data, task)
                if kind == "modules":
                    config["stages"] = MODULES
                    config["student"] = {"low_rank": {"keep": 0.6}, "dropout": False}
                config["batch"] |= {"micro_batch": layout[1], "grad_accum": layout[2]}
                config["student"]["zero_stage"], config["teacher"]["zero_stage"] = stage
                configs[(*layout, *stage)] = config
        launch(list(configs.values()), base / f"world{processes}", processes)
        found |= {key: logged(config) for key, config in configs.items()}
    return found


def test_every_layout_logs_the_same_losses(losses_of_all: dict[tuple, list[dict]]) -> None:
    reference = losses_of_all[(1, 4, 1, 0, 0)]
    assert len(reference) == 5
    assert len({key for steps in reference for key in steps if key.startswith("loss/")}) >= 5
    # Steps 1 to 4 also check the updates before them; with so high a learning rate a wrong gradient
    # shows.
    assert (
        abs(reference[4]["loss/total"] - reference[0]["loss/total"])
        > 0.01 * reference[0]["loss/total"]
    )
    worst = {}
    for key, steps in losses_of_all.items():
        for ours, theirs in zip(steps, reference, strict=True):
            terms = [term for term in theirs if term.startswith("loss/")]
            for term in [*terms, "grad_norm"]:
                gap = abs(ours[term] - theirs[term]) / max(abs(theirs[term]), 1e-6)
                worst[key] = max(worst.get(key, (0, "")), (gap, f"{term} at step {ours['step']}"))
    wrong = {key: gap for key, gap in worst.items() if gap[0] > 1e-4}
    assert not wrong, wrong
