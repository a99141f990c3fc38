"""`mlkd evaluate`: the report of a run once more, and what it leaves alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import run_config, world_of_one

from mlkd_dist.config import Config, StageConfig, UserError, from_mapping
from mlkd_dist.distill import distill, evaluate
from mlkd_dist.run import FINISHED, alone, standing
from mlkd_dist.saving import commit

LOSSES = {"soft_labels": {}, "hard_labels": {}}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict) -> Any:
    """A run of one step, and the world it was made in."""
    folder = tmp_path_factory.mktemp("done")
    stages = [{"name": "one", "steps": 1, "losses": LOSSES}]
    given = run_config(folder, teachers["classification"], data, stages=stages)
    with world_of_one() as world:
        distill(from_mapping(given), world)
        yield given, world


def config_of(done: Any, **changes: Any) -> Config:
    given, _ = done
    return from_mapping(given | changes)


def report_of(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.run.dir) / "report.json").read_text())


def test_a_report_made_again_is_the_same(done: Any) -> None:
    config = config_of(done)
    before = report_of(config)
    assert before["student_before"]["quality"]["accuracy"] >= 0
    evaluate(config, done[1])
    after = report_of(config)
    for each in (before, after):
        for model in ("teacher", "student"):
            del each[model]["latency_ms"]
    assert after == before and list(after)[:3] == ["teacher", "student_before", "student"]


def test_figures_of_other_rows_are_only_shown(
    done: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    given, world = done
    rows = Path(given["data"]["validation"]).read_text().splitlines()[:3]
    (tmp_path / "other.jsonl").write_text("\n".join(rows) + "\n")
    config = config_of(done, data=given["data"] | {"validation": str(tmp_path / "other.jsonl")})
    path = Path(config.run.dir) / "report.json"
    before = path.read_bytes()
    evaluate(config, world)
    said = capfd.readouterr()
    assert "held out: 3 texts" in said.out and "batch of 3 " in said.out
    assert "report.json is left as it is: this is of other settings (data.val" in said.err
    assert path.read_bytes() == before


def test_a_run_that_is_not_done_is_not_reported_on(done: Any) -> None:
    """The export is that of its first stage; a report would make it pass for finished."""
    config = config_of(done)
    assert standing(config) == FINISHED
    config.stages.append(StageConfig(name="two", steps=1, losses=config.stages[0].losses))
    with pytest.raises(UserError, match="is not done, and its export is that of an earlier stage"):
        evaluate(config, done[1])


def test_nobody_else_is_at_work_in_the_folder(done: Any) -> None:
    config = config_of(done)
    with (
        alone(Path(config.run.dir), done[1]),
        pytest.raises(UserError, match="another program is at work"),
    ):
        evaluate(config, done[1])


def test_where_a_run_stands(done: Any) -> None:
    folder = Path(config_of(done).run.dir)
    assert not commit.unfinished(folder, 1) and commit.unfinished(folder, 2)
    # A study removes the checkpoints of what is done.
    assert not commit.unfinished(folder / "export", 1)


def test_where_a_file_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert commit.writable("new.json") and commit.writable(tmp_path / "new.json")
    (tmp_path / "folder").mkdir()
    for place in ("", "folder", tmp_path, "no/such.json"):
        assert not commit.writable(place), place
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not commit.writable("new.json")
