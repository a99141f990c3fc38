"""`make faults` on a few cases: that it measures, and that what it puts in strikes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from strikes import ACTIONS, Fault, found, struck_by

from mlkd_dist.saving import commit


def test_faults_strike_where_and_when_they_are_told_to() -> None:
    told: list[Fault] = []
    faults = [
        Fault("no memory", "mlkd_dist.saving.commit.step_name", 2, ranks=(1,)),
        Fault("pass by", "mlkd_dist.saving.commit.step_name", 1, only=7),
    ]
    with struck_by(faults, 1, told.append):
        assert [commit.step_name(5), told] == ["step-000005", []]
        with pytest.raises(MemoryError):
            commit.step_name(6)
        assert commit.step_name(7) == "step-000007" and told == faults
    with struck_by(faults[:1], 0):
        assert [commit.step_name(5), commit.step_name(6)] == ["step-000005", "step-000006"]
    assert commit.step_name.__name__ == "step_name"


def test_every_kind_strikes_somewhere_that_is_there() -> None:
    from random import Random

    from faults.kinds import KINDS

    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names) >= 24
    for kind in KINDS:
        draws = [draw for draw in (kind.strikes, kind.again) if draw]
        assert draws or kind.name == "bad rows"
        for fault in (fault for draw in draws for fault in draw(Random(0))):
            owner, name = found(fault.at)
            assert callable(getattr(owner, name)) and fault.do in ACTIONS


def measured(out: Path, *groups: str) -> tuple[int, dict[str, Any]]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    words = {"QUICK": "1", "OUT": str(out), "ONLY": ",".join(groups), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "faults"], env=os.environ | words, timeout=500, cwd=ROOT
    )
    return done.returncode, json.loads(out.read_text())


@pytest.mark.slow
def test_one_command_measures_and_says_so(tmp_path: Path) -> None:
    code, results = measured(tmp_path / "results.json", "torn", "damaged")
    assert code == 0, results
    assert results["machine"]["cores"] and results["machine"]["versions"] and results["commit"]
    figures = {f["name"]: f for group in results["groups"].values() for f in group["figures"]}
    noticed = figures["corruptions noticed before use"]
    assert noticed["met"] and noticed["measured"] == "200 of 200" and len(noticed["cases"]) == 200
    assert all(
        case["struck"] and case["same_bits"]
        for case in results["groups"]["torn"]["figures"][0]["cases"]
    )
