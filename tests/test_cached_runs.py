"""Runs that read what `mlkd cache` wrote, beside the same runs with their teacher."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import BERT, logged, start, stored_config, world_of_one

from mlkd_dist import distill
from mlkd_dist.config import UserError, from_mapping
from mlkd_dist.processes.world import World
from mlkd_dist.saving import commit

ENTRIES = BERT["vocab_size"]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as found:
        yield found


# Two processes: what is written together is read by both, and by one of another batch.
LAYOUTS = {
    "classification": {
        "student__zero_stage": 2,
        "states": {
            "embedding_relation": {},
            "hidden_mse": {},
            "cls_cosine": {},
            "sample_relation": {"of": "mean"},
        },
    },
    "causal_lm": {
        "student__zero_stage": 3,
        "data__pack": True,
        "states": {"hidden_mse": {"layers": "last"}},
    },
    "masked_lm": {"batch__grad_accum": 2, "batch__micro_batch": 2, "student__zero_stage": 1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict) -> dict[str, dict]:
    """Per task, the same run with the teacher live and stored, in two processes."""
    base, found, words = tmp_path_factory.mktemp("cached runs"), {}, []

    def put(name: str, given: dict) -> str:
        found[name] = given
        (base / f"{name}.yaml").write_text(yaml.safe_dump(given))
        return str(base / f"{name}.yaml")

    for task, changes in LAYOUTS.items():
        top_k = None if task == "classification" else ENTRIES
        stored = stored_config(base / task, teachers[task], data, task, top_k, **changes)
        if task == "causal_lm":
            stored["teacher"]["zero_stage"] = 3
        live = json.loads(json.dumps(stored))
        live["teacher"]["cache"] = None
        live["run"]["dir"] += "-live"
        stored_path = put(task, stored)
        words += ["cache", stored_path, "distill", put(f"{task} live", live)]
        words += ["distill", stored_path]
    start("cache_runs.py", words, base, world=2)
    return found


@pytest.mark.parametrize("task", LAYOUTS)
def test_a_run_is_the_same_without_its_teacher(runs: dict[str, dict], task: str) -> None:
    """Logits that are all kept are the same numbers, but for the padding of the batch in which the
    teacher was run; of a vocabulary they are kept in 16 bit."""
    close = {"rel": 1e-5, "abs": 1e-6} if task == "classification" else {"rel": 2e-3}
    live, stored = logged(runs[f"{task} live"]), logged(runs[task])
    # The last step of an epoch is one short text, of which masked_lm may hide nothing.
    assert len(live) == 3 and live[0]["loss/soft_labels"] > 1e-3
    for one, other in zip(live, stored, strict=True):
        for key in {"grad_norm", *(key for key in one if key.startswith("loss/"))}:
            assert one[key] == pytest.approx(other[key], **close), (key, one[key], other[key])
    manifest = commit.read_manifest(Path(runs[task]["teacher"]["cache"]["dir"]))
    assert manifest["plan"]["rows"] > 0 and manifest["tokens"] > 0


def test_one_process_reads_what_two_have_written(
    runs: dict[str, dict], tmp_path: Path, world: World
) -> None:
    """With a micro-batch of the whole step: the same rows, losses and gradients."""
    given = json.loads(json.dumps(runs["classification"]))
    given["run"]["dir"] = str(tmp_path / "run")
    given["batch"] |= {"micro_batch": 8}
    distill.distill(from_mapping(given), world)
    for one, two in zip(logged(given), logged(runs["classification"]), strict=True):
        for key in ("loss/soft_labels", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-4)


def test_a_run_is_refused_before_it_writes(
    runs: dict[str, dict], world: World, tmp_path: Path
) -> None:
    given = json.loads(json.dumps(runs["classification"]))
    given["run"]["dir"] = str(tmp_path / "run")
    given["teacher"]["cache"]["dir"] = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing.*holds nothing of a teacher"):
        distill.distill(from_mapping(given), world)
    assert not any(tmp_path.iterdir())
