"""The same update however a step is spread: processes, micro-batches, ZeRO stages, sharded or whole
teacher."""

from pathlib import Path

import pytest
from conftest import launch, logged, run_config

# (processes, micro_batch, grad_accum), all with a global batch of 4. With two processes the last
# batch of the 17 rows leaves the second one without a row that counts.
LAYOUTS = [(1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2)]
# One run of a decoder for each way in which a head's weights may lie.
DECODER_RUNS = [
    (1, 4, 1, 0, 0),
    (1, 2, 2, 3, 3),
    (2, 2, 1, 1, 3),
    (2, 2, 1, 3, 3),
    (2, 1, 2, 2, 0),
    (2, 1, 2, 3, 0),
]
STAGES = [(student, teacher) for student in (0, 1, 2, 3) for teacher in (0, 3)]


@pytest.fixture(scope="module", params=["classification", "masked_lm", "embedding", "causal_lm"])
def losses_of_all(request, tmp_path_factory, teachers, data) -> dict[tuple, list[dict]]:
    """The logged steps of every layout; every pair of ZeRO stages for one task, the extremes for
    the others."""
    task, found = request.param, {}
    stages = STAGES if task in ("classification", "causal_lm") else [(0, 0), (3, 3)]
    base: Path = tmp_path_factory.mktemp(task)
    for processes in (1, 2):
        configs = {}
        for layout in LAYOUTS:
            for stage in stages:
                if layout[0] != processes or (processes == 1 and stage[0] in (1, 2)):
                    continue
                if task == "causal_lm" and (*layout, *stage) not in DECODER_RUNS:
                    continue
                folder = base / "-".join(map(str, (*layout, *stage)))
                folder.mkdir()
                config = run_config(folder, teachers[task], data, task)
                config["batch"] |= {"micro_batch": layout[1], "grad_accum": layout[2]}
                config["student"]["zero_stage"], config["teacher"]["zero_stage"] = stage
                # Small weights would stay whole between uses, as those of real models do not.
                zero = {"stage3_param_persistence_threshold": 0} if stage[0] == 3 else {}
                config["deepspeed"] = {"zero_optimization": zero}
                configs[(*layout, *stage)] = config
        launch(list(configs.values()), base / f"world{processes}", processes)
        found |= {key: logged(config) for key, config in configs.items()}
    return found


def test_every_layout_logs_the_same_losses(losses_of_all: dict[tuple, list[dict]]) -> None:
    reference = losses_of_all[(1, 4, 1, 0, 0)]
    assert len(reference) == 5
    terms = [key for key in reference[0] if key.startswith("loss/")]
    assert len(terms) >= 6
    # Steps 1 to 4 also check the updates before them; with so high a learning rate a wrong gradient
    # shows.
    assert (
        abs(reference[4]["loss/total"] - reference[0]["loss/total"])
        > 0.01 * reference[0]["loss/total"]
    )
    worst = {}
    for key, steps in losses_of_all.items():
        for ours, theirs in zip(steps, reference, strict=True):
            for term in [*terms, "grad_norm"]:
                gap = abs(ours[term] - theirs[term]) / max(abs(theirs[term]), 1e-6)
                worst[key] = max(worst.get(key, (0, "")), (gap, f"{term} at step {ours['step']}"))
    wrong = {key: gap for key, gap in worst.items() if gap[0] > 1e-4}
    assert not wrong, wrong
