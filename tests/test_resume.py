"""Runs that are killed and go on: the same weights and logs as if nothing had happened, and no
other run by mistake."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import start
from places import Place, same, weights

STAGES = [0, 1, 2, 3]
# The kills fall into the phase of the second layer and into that of the classifier.
LAYER_BY_LAYER = [
    {
        "name": "layers",
        "steps": 9,
        "losses": {"cls_cosine": {}, "hidden_mse": {}, "soft_labels": {}},
        "open": {"rule": "sid", "check_every": 2},
    }
]
# Killed where one checkpoint is being written and the one before is there.
IN_BACKGROUND = [0, 3]
# Of ZeRO stages and types those whose optimizers differ.
NOT_FINITE = [(0, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16")]


def alike(place: "Place", name: str) -> bool:
    """Whether a run logged what the uninterrupted one of another layout did, to 1e-4."""
    pairs = zip(place.logs(name), place.logs("plain"), strict=True)
    return all(
        ours[key] == pytest.approx(theirs[key], rel=1e-4)
        for ours, theirs in pairs
        for key in ("step", "loss/total", "loss/hidden_mse")
    )


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((ours[n].float() - theirs[n].float()).abs().max()) for n in ours)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict) -> Place:
    """With two processes: every ZeRO stage whole and killed twice, with dropout; and a run without
    dropout, whole and killed, for others to go on with."""
    place = Place(tmp_path_factory.mktemp("two"), teachers["classification"], data)
    words = []
    for stage in STAGES:
        for name in (f"whole{stage}", f"killed{stage}"):
            config = place.config(name, student__zero_stage=stage, student__dropout=True)
            config["batch"] |= {"micro_batch": 1, "grad_accum": 2}
            if stage == 1:
                config["stages"] = LAYER_BY_LAYER
            if stage in IN_BACKGROUND and name.startswith("killed"):
                config["run"] |= {"save_in_background": True, "checkpoint_every": 1}
            path = place.write(name, config)
            words += [path] if name.startswith("whole") else [f"{path}@3", f"{path}@7", path]
    for stage, dtype in NOT_FINITE:
        config = place.config(f"nan{stage}{dtype}", student__zero_stage=stage)
        config["batch"] |= {"micro_batch": 1, "grad_accum": 2}
        config["student"]["dtype"] = dtype
        words.append(place.write(f"nan{stage}{dtype}", config) + "~5")
    hopeless = place.config("hopeless", student__zero_stage=2)
    hopeless["batch"]["micro_batch"] = 2
    hopeless["run"]["max_skipped"] = 1
    words.append(place.write("hopeless", hopeless) + "~5")
    for name in ("plain", "cut"):
        config = place.config(name, student__zero_stage=2)
        config["batch"] |= {"micro_batch": 1, "grad_accum": 2}
        words.append(place.write(name, config) + ("@7" if name == "cut" else ""))
    start("interrupted_runs.py", words, place.base, world=2)
    return place


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_twice_ends_with_the_same_bits(two: Place, stage: int) -> None:
    whole, killed = f"whole{stage}", f"killed{stage}"
    assert two.said(whole) == two.said(killed) == ["done", ""]
    assert same(two.weights(killed), two.weights(whole))
    assert two.logs(killed) == two.logs(whole)
    # Steps made twice are there once: metrics.jsonl by its lines, TensorBoard by what it shows.
    steps = [row["step"] for row in two.logs(whole)]
    # Where a layer opens, a line of its own is logged.
    assert steps == [1, 3, 5, 7, 8] if stage != 1 else steps[-1] == 8
    assert two.steps_on_the_board(killed) == steps
    assert json.loads((two.run(killed) / "report.json").read_text())["student"]


@pytest.mark.parametrize("stage", IN_BACKGROUND)
def test_what_was_written_in_the_background_is_gone_on_with(two: Place, stage: int) -> None:
    folder = two.run(f"killed{stage}") / "checkpoints"
    names = {"LATEST", "step-000004", "step-000007", "step-000008", "step-000009"}
    assert {path.name for path in folder.iterdir()} == names - {"step-000007"}
    # Both kills came after a checkpoint within a stage.
    assert two.starts(f"killed{stage}") == [2, 6]


def test_a_run_folder_holds_what_is_documented(two: Place) -> None:
    folder = two.run("killed2")
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "tb",
        "student",
        "checkpoints",
        "export",
        "report.json",
    }
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    # The two newest, and the end of stage one, which the older of them starts from.
    assert names == ["LATEST", "step-000004", "step-000008", "step-000009"]
    inside = {path.name for path in (folder / "checkpoints" / "step-000008").iterdir()}
    assert inside == {"manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"}
    text = (folder / "checkpoints" / "step-000008" / "manifest.json").read_text()
    manifest = json.loads(text.splitlines()[0])
    assert (manifest["stage"], manifest["stage_step"], manifest["start"]) == (1, 4, "step-000004")
    assert manifest["settings"]["stages[1].losses.soft_labels.temperature"] == 1
    assert {"teacher.path", "student.path", "data.train", "tokenizer"} <= set(
        manifest["fingerprints"]
    )


def test_no_checkpoint_holds_the_teacher(two: Place) -> None:
    """Of every weight its fp32 value and two moments, of the student and its projections, and no
    more."""
    student = two.weights("whole2")
    # Projections from 24 to 48; counters, random numbers and names are small.
    weights = sum(tensor.numel() for tensor in student.values()) + 24 * 48
    folder = two.run("whole2") / "checkpoints" / "step-000008"
    size = sum(path.stat().st_size for path in folder.glob("rank-*"))
    assert 12 * weights <= size < 12 * weights * 1.6


@pytest.mark.parametrize("stage, dtype", NOT_FINITE)
def test_a_loss_that_is_not_finite_in_one_process_skips_the_step(
    two: Place, stage: int, dtype: str
) -> None:
    name = f"nan{stage}{dtype}"
    assert two.said(name) == ["done", ""]
    rows = {row["step"]: row for row in two.logs(name)}
    assert [row["skipped_steps"] for row in rows.values()] == [0, 0, 1, 1, 1]
    # What follows was trained as before the step, and by all processes alike.
    assert all(torch.isfinite(tensor).all() for tensor in two.weights(name).values())
    assert 0 < rows[8]["loss/total"] < 1.1 * rows[5]["loss/total"] and rows[8]["grad_norm"] > 0


def test_too_many_of_them_stop_the_run(two: Place) -> None:
    kind, message = two.said("hopeless")
    assert kind == "Diverged"
    assert "1 steps in a row, up to step 6," in message and "step-000004" in message


@pytest.fixture(scope="module")
def one(two: Place) -> Place:
    """With one process, from the run that two processes began."""
    words = []

    def go_on(name: str, source: str = "cut", **changes: object) -> dict:
        config = two.config(name, **{"student__zero_stage": 0} | changes)
        config["batch"] |= {"micro_batch": 4, "grad_accum": 1}
        two.copy(source, name)
        return config

    def damage(name: str, *steps: int) -> None:
        for step in steps:
            path = two.run(name) / "checkpoints" / f"step-{step:06d}" / "rank-00001.safetensors"
            whole = bytearray(path.read_bytes())
            whole[len(whole) // 2] ^= 1
            path.write_bytes(whole)

    for stage in (0, 3):
        words.append(two.write(f"one{stage}", go_on(f"one{stage}", student__zero_stage=stage)))
    words.append(two.write("damaged newest", go_on("damaged newest")))
    damage("damaged newest", 6)
    words.append(two.write("all damaged", go_on("all damaged")))
    shutil.rmtree(two.run("all damaged") / "checkpoints" / "step-000004" / "export")
    words.append(two.write("all gone", go_on("all gone")))
    for path in (two.run("all gone") / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    words.append(two.write("another rate", go_on("another rate", optim__lr=1e-3)))
    agreed = go_on("another rate agreed", optim__lr=1e-3)
    agreed["run"]["resume"] = "changed"
    words.append(two.write("another rate agreed", agreed))
    larger = go_on("another batch")
    larger["batch"]["micro_batch"] = 8
    words.append(two.write("another batch", larger))
    other = two.base / "other.jsonl"
    lines = Path(two.data["train"]).read_text().splitlines()
    other.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    words.append(two.write("other data", go_on("other data", data__train=str(other))))
    moved = two.base / "moved.jsonl"
    shutil.copy(two.data["train"], moved)
    words.append(two.write("moved data", go_on("moved data", data__train=str(moved))))
    for point in ("renamed", "copied", "export removed", "published"):
        # Where stage one ends, at step 4, and then where it passes that point next.
        path = two.write(point, two.config(point, student__zero_stage=0))
        words += [f"{path}@3", f"{path}:{point}", f"{path}:{point}", path]
    limited = two.config("limited", student__zero_stage=0)
    limited["run"]["time_limit"] = 1e-6
    words += [two.write("limited", limited)] * 2
    words.append(two.write("finished", go_on("finished", source="plain")))
    renewed = go_on("finished with another rate", source="plain", optim__lr=1e-3)
    words.append(two.write("finished with another rate", renewed))
    start("interrupted_runs.py", words, two.base, world=1)
    return two


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.slow
def test_one_process_goes_on_where_two_were(one: Place, stage: int) -> None:
    assert one.said(f"one{stage}") == ["done", ""]
    assert gap(one.weights("plain"), weights(one.run("plain") / "student")) > 0.01
    assert alike(one, f"one{stage}")
    assert gap(one.weights(f"one{stage}"), one.weights("plain")) < 1e-3


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(one: Place) -> None:
    assert one.said("damaged newest") == ["done", ""]
    log = (one.base / "rank0.log").read_text()
    assert "step-000006 is not used: rank-00001.safetensors is damaged" in log
    assert "damaged newest/run': resuming from step 4" in log
    assert alike(one, "damaged newest")


@pytest.mark.slow
def test_without_a_sound_checkpoint_nothing_starts(one: Place) -> None:
    for name, why in (("all damaged", "is missing"), ("all gone", "'step-000006', the latest")):
        kind, message = one.said(name)
        assert kind == "UserError"
        assert "no sound checkpoint" in message and why in message, message
        assert "run.resume=never run.overwrite=true" in message
        assert not (one.run(name) / "report.json").exists()


@pytest.mark.slow
def test_other_mathematics_is_refused_by_name(one: Place) -> None:
    kind, message = one.said("another rate")
    assert kind == "UserError" and "optim.lr: 0.01 -> 0.001" in message
    assert "run.resume=changed" in message
    kind, message = one.said("another batch")
    assert kind == "UserError" and "batch.micro_batch x batch.grad_accum: 4 -> 8" in message
    kind, message = one.said("other data")
    assert kind == "UserError" and "what data.train holds" in message


@pytest.mark.slow
def test_what_was_agreed_to_or_only_moved_goes_on(one: Place) -> None:
    assert one.said("another rate agreed") == ["done", ""]
    rates = {row["step"]: row["lr"] for row in one.logs("another rate agreed")}
    before = {row["step"]: row["lr"] for row in one.logs("plain")}
    assert rates[5] == before[5] and rates[7] == pytest.approx(0.1 * before[7])
    assert one.said("moved data") == ["done", ""]
    assert alike(one, "moved data")


@pytest.mark.parametrize("point", ["renamed", "copied", "export removed", "published"])
@pytest.mark.slow
def test_a_kill_between_two_stages_loses_nothing(one: Place, point: str) -> None:
    assert one.said(point) == ["done", ""]
    assert alike(one, point)
    names = {path.name for path in (one.run(point) / "checkpoints").iterdir()}
    assert names == {"LATEST", "step-000004", "step-000008", "step-000009"}


@pytest.mark.slow
def test_a_time_limit_stops_a_run_after_a_step_with_a_checkpoint(one: Place) -> None:
    kind, message = one.said("limited")
    assert kind == "Stopped" and "stopped after step 2" in message
    names = [path.name for path in (one.run("limited") / "checkpoints").glob("step-*")]
    assert sorted(names) == ["step-000001", "step-000002"]


@pytest.mark.slow
def test_a_finished_run_says_so(one: Place) -> None:
    assert one.said("finished") == ["done", ""]
    assert "finished/run' is finished" in (one.base / "rank0.log").read_text()
    assert same(one.weights("finished"), one.weights("plain"))
    kind, message = one.said("finished with another rate")
    assert kind == "UserError" and "optim.lr: 0.01 -> 0.001" in message
    assert "run.overwrite=true" in message
