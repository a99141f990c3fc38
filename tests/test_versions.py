"""Versions of other packages: too old, missing, or not the same everywhere."""

import re
import sys
import tomllib

import pytest
from conftest import ROOT

from mlkd_dist import cli
from mlkd_dist.config import UserError
from mlkd_dist.processes import versions


def test_the_floors_are_those_of_the_installation() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in wanted)
    assert versions.FLOORS.items() <= floors.items()


def test_what_is_installed_here_is_new_enough() -> None:
    versions.check_versions()


@pytest.mark.parametrize("package", versions.FLOORS)
@pytest.mark.parametrize("found", ["0.0.9", None])
def test_old_and_missing_packages_end_the_program_with_2(
    package: str,
    found: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    real = versions.installed
    monkeypatch.setattr(
        versions, "installed", lambda name: found if name == package else real(name)
    )
    monkeypatch.setattr(sys, "argv", ["mlkd", "distill", "no such config"])
    assert cli.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert package in line and versions.FLOORS[package] in line and "pip install" in line
    assert (found or "is not installed") in line


@pytest.mark.parametrize(
    "found, floor, too_old",
    [
        ("2.9.1", "2.10", True),
        ("2.10.0", "2.10", False),
        ("2.10.0a0+3f2a.nv26.1", "2.10", False),
        ("2.13.0+cpu", "2.10", False),
        ("0.19.7", "0.19.8", True),
        ("5", "5.3", True),
        ("git-main", "5.3", False),
    ],
)
def test_versions_are_compared_by_their_numbers(found: str, floor: str, too_old: bool) -> None:
    assert versions.older(found, floor) is too_old


def test_processes_with_different_versions_are_refused_by_name() -> None:
    here = versions.versions()
    versions.refuse_different([here, dict(here)])
    with pytest.raises(UserError, match=r"torch is 2\.11 in process 1 and .* in process 0"):
        versions.refuse_different([here, here | {"torch": "2.11"}])
