"""Settings, data and rows that cannot be right: refused or left out, before anything is trained on
them."""

from collections.abc import Callable
from typing import Any

import test_bad_input
import test_bad_rows
import test_config
from conftest import made_tokenizer
from places import Place

from faults.work import Figure, Work, case
from mlkd_dist.config import UserError
from mlkd_dist.data import prepare
from mlkd_dist.inputs.quarantine import Quarantine


def measure(work: Work) -> list[Figure]:
    place = work.place("refused")
    figures = [accepted(place), bad_rows(work, place)]
    if not work.quick:
        figures.insert(1, data_and_models(place))
    return figures


def of_all(name: str, wanted: int, what: str, cases: list[dict[str, Any]]) -> Figure:
    """How many came through."""
    through = sum(not each["passed"] for each in cases)
    met = not through and len(cases) >= wanted
    text = f"0 of {wanted} or more"
    return Figure(name, text, f"{through} of {len(cases)}{what}", met, cases)


def accepted(place: Place) -> Figure:
    folder = place.base / "configs"
    folder.mkdir()
    expected = test_config.REFUSED | test_config.REFUSED_FILES
    cases = []
    for line, (code, printed, _, torch) in test_config.say(
        test_config.write_folder(folder)
    ).items():
        sentence = printed.count("\n") == 1 and all(piece in printed for piece in expected[line])
        passed = code == 2 and sentence and not torch
        cases.append({"case": line, "passed": passed, "code": code, "said": printed[:200]})
    return of_all("bad configs accepted, or not refused by name", 60, "", cases)


def data_and_models(place: Place) -> Figure:
    folder = place.base / "inputs"
    folder.mkdir()
    answer, cases = test_bad_input.run_all(folder), []
    for name, pieces in test_bad_input.SAID.items():
        (kind, message), untouched = answer(name)
        named = kind == "UserError" and all(piece in message for piece in pieces)
        cases.append({"case": name, "passed": named and untouched, "said": [kind, message]})
    return of_all("data and models that cannot be used, accepted", 40, "", cases)


def bad_rows(work: Work, place: Place) -> Figure:
    tokenizer = made_tokenizer(place.base / "tokenizer", test_bad_rows.TEMPLATE)
    cases = [
        case(place, f"{kind}: {name}", lambda k=kind, n=name: caught(place, tokenizer, k, n))
        for kind, name in work.some(test_bad_rows.CASES, 20)
    ]
    return of_all("kinds of bad rows that come through", 20, " kinds", cases)


def caught(place: Place, tokenizer: Any, kind: str, name: str) -> dict[str, Any]:
    """An error by its line; and with data.max_bad left out, as if it had not been there."""
    _, good, bad = test_bad_rows.KINDS[kind]
    row, reason = bad[name]
    folder = place.base / f"{kind}: {name}"
    folder.mkdir()

    def file(name: str, rows: list[Any]) -> str:
        return test_bad_rows.write(folder / f"{name}.jsonl", rows)

    held_out = file("held out", [good])

    def read(train: str, max_bad: float) -> tuple[list[dict], Quarantine]:
        found, task = Quarantine(max_bad), test_bad_rows.task_of(kind)
        rows, _ = prepare(
            train, held_out, 0, task, tokenizer, test_bad_rows.SIZE, str(folder / "cache"),
            quarantine=found,
        )  # fmt: skip
        return rows.to_list(), found

    train = file("train", [good, good, row, good])
    said = refusal(lambda: read(train, 0))
    named = said is not None and "line 3: " in said and reason in said
    rows, found = read(train, 1)
    same = rows == read(file("clean", [good] * 3), 0)[0] and found.counts["data.train"] == 1
    return {"passed": named and same, "said": said}


def refusal(work: Callable[[], Any]) -> str | None:
    try:
        work()
    except UserError as error:
        return str(error)
    return None
