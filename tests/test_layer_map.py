"""Which teacher layer each student layer learns from."""

import re

import pytest

from mlkd_dist.layer_map import layer_pairs

DEPTHS = [(s, t) for t in (1, 4, 6, 12, 24) for s in (1, 2, 3, 4, 5, 6, 12) if s <= t]


@pytest.mark.parametrize(("student", "teacher"), DEPTHS)
def test_uniform_takes_the_last_layer_of_each_equal_segment(student: int, teacher: int) -> None:
    pairs = layer_pairs("uniform", student, teacher)
    assert [ours for ours, _ in pairs] == list(range(student))
    theirs = [layer for _, layer in pairs]
    # The last learns from the last, none from the same as another, and the segments that end there
    # differ in length by at most one.
    assert theirs[-1] == teacher - 1
    lengths = [b - a for a, b in zip([-1, *theirs], theirs, strict=False)]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
    if teacher % student == 0:
        assert set(lengths) == {teacher // student}


def test_the_maps_of_the_papers() -> None:
    # 12 layers to 6 and to 3, in the papers' counting from 1: every second, every fourth.
    assert layer_pairs("uniform", 6, 12) == [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]
    assert layer_pairs("uniform", 3, 12) == [(0, 3), (1, 7), (2, 11)]
    assert layer_pairs("last", 6, 12) == [(5, 11)]
    assert layer_pairs("last", 12, 6) == [(11, 5)]


def test_pairs_are_taken_as_given() -> None:
    assert layer_pairs([[1, 0], [0, 3]], 2, 4) == [(1, 0), (0, 3)]
    assert layer_pairs([[0, 0], [0, 3]], 2, 4) == [(0, 0), (0, 3)]


REFUSED = {
    "deeper than its teacher": ("uniform", 6, 4, "it has 6 layers and the teacher 4. Give the pai"),
    "student layer": ([[0, 0], [2, 1]], 2, 4, "pair [2, 1] names layer 2 of the student, which ha"),
    "teacher layer": ([[1, 4]], 2, 4, "layer 4 of the teacher, which has layers 0 to 3"),
    "from the end": ([[0, -1]], 2, 4, "layer -1 of the teacher, which has layers 0 to 3"),
    "other word": ("first", 2, 4, "'first' is not uniform, last, or pairs [[student, teacher]"),
    "no pairs": ([], 2, 4, "[] is not uniform, last, or pairs"),
    "flat": ([0, 1], 2, 4, "[0, 1] is not uniform, last, or pairs"),
    "three": ([[0, 1, 2]], 2, 4, "[[0, 1, 2]] is not uniform, last, or pairs"),
    "no number": ([[0, "1"]], 2, 4, "[[0, '1']] is not uniform, last, or pairs"),
    "true": ([[True, 1]], 2, 4, "[[True, 1]] is not uniform, last, or pairs"),
    "nothing": (None, 2, 4, "None is not uniform, last, or pairs"),
    "mapping": ({0: 1}, 2, 4, "{0: 1} is not uniform, last, or pairs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_map_is_refused(case: str) -> None:
    layers, student, teacher, said = REFUSED[case]
    with pytest.raises(ValueError, match="^layers: .*" + re.escape(said)):
        layer_pairs(layers, student, teacher)
