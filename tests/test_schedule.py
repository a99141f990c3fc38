"""Which layers' losses count when, and that a run which continues opens them at the same steps."""

import pytest
import torch

from mlkd_dist.config import OpenConfig, OptimConfig, StageConfig, UserError
from mlkd_dist.schedule import Opening, opening, warmup_steps

LAYERS = [0, 2, 5]


def rule(kind: str = "sid", **changes: object) -> OpenConfig:
    defaults = {"threshold": 0.0, "keep_soft_labels": False, "check_every": 1}
    return OpenConfig(**{"rule": kind, **defaults, **changes})


def played(made: Opening, cosines: list[float | None], start: int = 0) -> list[tuple]:
    """What counts at each step: the open layers, and whether losses without layers do."""
    seen = []
    for step, cosine in enumerate(cosines, start):
        seen.append((tuple(made.open), made.predicts))
        made.end_step(step, None if cosine is None else torch.tensor(cosine))
    return seen


def runs(seen: list[tuple]) -> list[tuple]:
    """The same with lengths: (open layers, predicts, steps)."""
    found: list[list] = []
    for layers, predicts in seen:
        if not found or found[-1][:2] != [layers, predicts]:
            found.append([layers, predicts, 0])
        found[-1][2] += 1
    return [tuple(x) for x in found]


def test_pid_has_one_layer_at_a_time_and_equal_parts() -> None:
    assert runs(played(Opening(rule("pid"), LAYERS, 12), [None] * 12)) == [
        ((0,), False, 3),
        ((2,), False, 3),
        ((5,), False, 3),
        ((), True, 3),
    ]


def test_sid_keeps_what_is_open() -> None:
    assert runs(played(Opening(rule("sid"), LAYERS, 12), [None] * 12)) == [
        ((0,), False, 3),
        ((0, 2), False, 3),
        ((0, 2, 5), False, 3),
        ((), True, 3),
    ]


def test_soft_labels_may_count_throughout() -> None:
    seen = played(Opening(rule("pid", keep_soft_labels=True), LAYERS, 12), [None] * 12)
    assert [layers for layers, _ in seen[::3]] == [(0,), (2,), (5,), ()]
    assert all(predicts for _, predicts in seen)


@pytest.mark.parametrize(("share", "last"), [(None, 25), (0.4, 40), (0.1, 10)])
def test_the_classifier_gets_its_share(share: float | None, last: int) -> None:
    found = runs(played(Opening(rule(classifier=share), LAYERS, 100), [None] * 100))
    assert found[-1] == ((), True, last)
    assert sum(length for *_, length in found[:-1]) == 100 - last
    lengths = [length for *_, length in found[:-1]]
    assert max(lengths) - min(lengths) <= 1


def test_a_layer_under_the_threshold_opens_the_next_and_leaves_it_its_time() -> None:
    cosines = [0.5, 0.04] + [0.5] * 10
    # Layer 0 needs 2 of its 3 steps; layer 2 still ends with step 6, so it has 4.
    assert runs(played(Opening(rule(threshold=0.05), LAYERS, 12), cosines)) == [
        ((0,), False, 2),
        ((0, 2), False, 4),
        ((0, 2, 5), False, 3),
        ((), True, 3),
    ]


def test_the_classifier_gets_the_rest_where_all_layers_are_done_early() -> None:
    found = runs(played(Opening(rule(threshold=0.05), LAYERS, 12), [0.01] * 12))
    assert [length for *_, length in found] == [1, 1, 1, 9]


def test_the_threshold_is_held_against_the_mean_since_the_last_look() -> None:
    made = Opening(rule(threshold=0.05, check_every=4, classifier=0.1), LAYERS, 100)
    # One lucky step does not count; the mean of steps 4 to 7 does.
    cosines = [0.5, 0.5, 0.5, 0.0, 0.06, 0.05, 0.04, 0.04, 0.5, 0.5, 0.5, 0.5]
    assert runs(played(made, cosines)) == [((0,), False, 8), ((0, 2), False, 4)]


def test_steps_of_another_phase_are_not_in_the_mean() -> None:
    made = Opening(rule(threshold=0.05, check_every=4, classifier=0.1), LAYERS, 20)
    # Layer 0 ends by its budget after 6 steps; steps 4 and 5 would spoil the mean of 6 and 7.
    cosines = [0.9] * 6 + [0.01] * 3
    assert [x[2] for x in runs(played(made, cosines))] == [6, 2, 1]


def test_end_step_says_where_something_changed() -> None:
    made = Opening(rule(), LAYERS, 8)
    assert [made.end_step(step, None) for step in range(8)] == [False, True] * 3 + [False] * 2


@pytest.mark.parametrize("kind", ["pid", "sid"])
@pytest.mark.parametrize("stop", range(1, 24))
def test_a_run_that_continues_opens_the_same_layers_at_the_same_steps(kind: str, stop: int) -> None:
    given = rule(kind, threshold=0.05, check_every=4)
    # Falls below the threshold in the middle of phases and of looks.
    cosines = [0.1 * 0.7 ** (step % 9) for step in range(24)]
    whole = Opening(given, LAYERS, 24)
    expected = played(whole, cosines)
    assert len(runs(expected)) == 4
    first = Opening(given, LAYERS, 24)
    begun = played(first, cosines[:stop])
    state = first.state_dict()
    assert all(type(value) in (int, float) for value in state.values())
    continued = Opening(given, LAYERS, 24)
    continued.load_state_dict(state)
    assert begun + played(continued, cosines[stop:], stop) == expected
    assert continued.state_dict() == whole.state_dict()


def test_a_run_that_continues_with_fewer_layers_is_at_the_classifier() -> None:
    before = Opening(rule(), LAYERS, 12)
    played(before, [None] * 7)
    after = Opening(rule(), LAYERS[2:], 12)
    after.load_state_dict(before.state_dict())
    assert runs(played(after, [None] * 5, start=7)) == [((), True, 5)]


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (0.1, 100, 10),
        (0.07, 100, 7),
        (0.14, 50, 7),
        (0.1, 1, 0),
        (0.1, 5, 1),
        (3, 10, 3),
        (9, 4, 3),
    ],
)
def test_a_warm_up_is_a_share_or_a_number_of_steps(
    warmup: float, steps: int, expected: int
) -> None:
    """A step at a rate of 0 is not all of a stage."""
    assert warmup_steps(OptimConfig(warmup=warmup), steps) == expected


def test_all_at_once_needs_no_rule() -> None:
    for given in (None, OpenConfig("all")):
        assert opening("stages[0]", StageConfig(open=given), LAYERS, 1) is None


@pytest.mark.parametrize(("steps", "share"), [(3, None), (12, 0.01), (12, 0.9)])
def test_every_layer_and_the_classifier_need_a_step(steps: int, share: float | None) -> None:
    stage = StageConfig(open=rule(classifier=share))
    with pytest.raises(UserError, match=rf"^stages\[1\]\.open: {steps} steps are too few for 3"):
        opening("stages[1]", stage, LAYERS, steps)
