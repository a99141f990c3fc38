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
# What differs most, where only the task does.
FEW_RUNS = [(1, 4, 1, 0, 0), (1, 2, 2, 3, 3), (2, 1, 2, 3, 3)]
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


SLOW = pytest.mark.slow
# Those that are not slow have every loss and every stage between them.
KINDS = ["classification", "causal_lm"]
KINDS += [pytest.param(kind, marks=SLOW) for kind in ("masked_lm", "embedding", "modules")]


@pytest.fixture(scope="module", params=KINDS)
def losses_of_all(request, tmp_path_factory, teachers, data) -> dict[tuple, list[dict]]:
    """The logged steps of every layout; every pair of ZeRO stages for one task, some for the
    others."""
    kind, found = request.param, {}
    task = "classification" if kind == "modules" else kind
    stages = STAGES if kind in ("classification", "causal_lm") else [(0, 0), (3, 3)]
    base: Path = tmp_path_factory.mktemp(kind)
    for processes in (1, 2):
        configs = {}
        for layout in LAYOUTS:
            for stage in stages:
                if layout[0] != processes or (processes == 1 and stage[0] in (1, 2)):
                    continue
                some = {"causal_lm": DECODER_RUNS, "masked_lm": FEW_RUNS, "embedding": FEW_RUNS}
                if (run := (*layout, *stage)) not in some.get(kind, [run]):
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
                # Small weights would stay whole between uses, as those of real models do not.
                zero = {"stage3_param_persistence_threshold": 0} if stage[0] == 3 else {}
                config["deepspeed"] = {"zero_optimization": zero}
                configs[(*layout, *stage)] = config
        launch(list(configs.values()), base / f"world{processes}", processes)
        found |= {key: logged(config) for key, config in configs.items()}
    return found


def check_parity(found: dict[tuple, list[dict]], reference: list[dict]) -> None:
    """The same losses and gradient norms, to 1e-4, in all runs."""
    worst = {}
    for key, steps in found.items():
        for ours, theirs in zip(steps, reference, strict=True):
            for term in [
                *(key for key in theirs if key.startswith(("loss/", "open/"))),
                "grad_norm",
            ]:
                gap = abs(ours[term] - theirs[term]) / max(abs(theirs[term]), 1e-6)
                worst[key] = max(worst.get(key, (0, "")), (gap, f"{term} at step {ours['step']}"))
    wrong = {key: gap for key, gap in worst.items() if gap[0] > 1e-4}
    assert not wrong, wrong


def test_every_layout_logs_the_same_losses(losses_of_all: dict[tuple, list[dict]]) -> None:
    reference = losses_of_all[(1, 4, 1, 0, 0)]
    assert len(reference) == 5
    terms = {key for steps in reference for key in steps if key.startswith("loss/")}
    assert len(terms) >= 5
    # Steps 1 to 4 also check the updates before them; with so high a learning rate a wrong gradient
    # shows.
    assert (
        abs(reference[4]["loss/total"] - reference[0]["loss/total"])
        > 0.01 * reference[0]["loss/total"]
    )
    check_parity(losses_of_all, reference)


# One layer after the other, so that most weights get no gradient at first and the projections none
# at last; and layers that open by the threshold, which all processes must see alike.
OPENINGS = {
    "pid": {"rule": "pid", "threshold": 0.0},
    "sid": {"rule": "sid", "threshold": 10.0, "check_every": 2, "keep_soft_labels": True},
}
INTERNAL = {
    "attention_kl": {},
    "attention_mse": {"weight": 0.1},
    "cls_cosine": {"shared_projection": False},
    # Soft labels soon come so near to 0 that rounding is a large part of them.
    "hard_labels": {},
}


@pytest.fixture(scope="module", params=["pid", pytest.param("sid", marks=SLOW)])
def opening_runs(request, tmp_path_factory, teachers, data) -> dict[tuple, list[dict]]:
    """Nine steps of two layers and the classifier: the logged steps of every layout."""
    base: Path = tmp_path_factory.mktemp(request.param)
    stage = {"name": "one", "steps": 9, "losses": INTERNAL, "open": OPENINGS[request.param]}
    found, sharded = {}, (0, 2, 3) if request.param == "pid" else (3,)
    for processes, layouts in ((1, [(4, 1, 0)]), (2, [(1, 2, zero) for zero in sharded])):
        configs = {}
        for layout in layouts:
            folder = base / "-".join(map(str, (processes, *layout)))
            folder.mkdir()
            config = run_config(folder, teachers["classification"], data, stages=[stage])
            config["student"]["from_teacher"]["heads"], config["optim"]["lr"] = 4, 3e-3
            config["batch"] |= {"micro_batch": layout[0], "grad_accum": layout[1]}
            config["student"]["zero_stage"] = layout[2]
            config["teacher"]["zero_stage"] = 3 if layout[2] == 3 else 0
            configs[(processes, *layout)] = config
        launch(list(configs.values()), base / f"world{processes}", processes)
        found |= {key: logged(config) for key, config in configs.items()}
    return found


def test_layers_open_alike_in_every_layout(
    opening_runs: dict[tuple, list[dict]], request: pytest.FixtureRequest
) -> None:
    reference = opening_runs[(1, 4, 1, 0)]
    keys = ["open/layer_0", "open/layer_1", "open/prediction"]
    seen = [tuple(row[key] for key in keys) for row in reference]
    pid = "pid" in request.node.name
    expected = [(1, 0, 0)] * 3 + [(0, 1, 0)] * 3 + [(0, 0, 1)] * 3
    by_threshold = [(1, 0, 1)] * 2 + [(1, 1, 1)] * 2 + [(0, 0, 1)] * 5
    assert seen == (expected if pid else by_threshold)
    for row, (one, other, prediction) in zip(reference, seen, strict=True):
        losses = {key.removeprefix("loss/") for key in row if key.startswith("loss/")}
        of_layers = {"attention_kl", "attention_mse", "cls_cosine"} if one or other else set()
        assert losses == {"total"} | of_layers | ({"hard_labels"} if prediction else set())
    check_parity(opening_runs, reference)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_what_rests_on_the_host_changes_nothing(
    task: str, tmp_path: Path, teachers: dict, data: dict
) -> None:
    """Optimizer states of the student at each stage that shards them, and the teacher's weights, or
    these on a disk."""
    configs, disk = {}, tmp_path / "disk"
    few = [(0, 0), (2, 3), (3, 3)]
    for stages in STAGES if task == "classification" else few:
        folder = tmp_path / "-".join(map(str, stages))
        folder.mkdir()
        config = run_config(folder, teachers[task], data, task)
        config["batch"] |= {"micro_batch": 1, "grad_accum": 2}
        for model, stage in zip(("student", "teacher"), stages, strict=True):
            config[model] |= {"zero_stage": stage, "offload": "cpu" if stage else "none"}
        if stages == (2, 3):
            config["teacher"] |= {"offload": "nvme", "offload_dir": str(disk)}
        configs[stages] = config
    launch([*configs.values()], tmp_path / "logs", 2)
    found = {stages: logged(config) for stages, config in configs.items()}
    check_parity(found, found[(0, 0)])
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_a_teacher_of_any_type_teaches_the_same(tmp_path: Path, teachers: dict, data: dict) -> None:
    """Every loss, but for the rounding of what it reads."""
    task, configs = "causal_lm", {}
    for dtype in ("fp32", "bf16", "fp16"):
        (tmp_path / dtype).mkdir()
        configs[dtype] = run_config(tmp_path / dtype, teachers[task], data, task)
        configs[dtype]["teacher"]["dtype"] = dtype
    launch([*configs.values()], tmp_path / "logs")
    full, *others = (logged(config)[0] for config in configs.values())
    for half in others:
        assert {key: half[key] for key in full if key.startswith("loss/")} == pytest.approx(
            {key: full[key] for key in full if key.startswith("loss/")}, rel=3e-2
        )
