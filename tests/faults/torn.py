"""Kills at every point of the protocol that makes a checkpoint whole or not there, and a student
the run's export: of each process, in the first save and in later ones."""

from itertools import groupby
from typing import Any

from places import Place, digest
from strikes import POINT, Fault

from faults import ranks
from faults.survived import whole
from faults.work import Figure, Work, case, config, share


def measure(work: Work) -> list[Figure]:
    place = work.place("torn")
    clean = whole(place, "clean", 0, [])
    points = passed(place)
    cases = [
        case(place, told(*point), lambda p=point: survive(place, *p, clean))
        for point in work.some(points, 4)
    ]
    figure = share("torn saves: a kill at every point, and it goes on", "all of 24 or more", cases)
    figure.met &= work.quick or len(cases) >= 24
    return [figure]


def told(rank: int, number: int, point: str) -> str:
    return f"process {rank}, point {number}, {point}"


def passed(place: Place) -> list[tuple[int, int, str]]:
    """(process, number, name) of every point; of many files one after the other the first and the
    last."""
    path = place.write("points", config(place, "points"))
    found = ranks.run("points", [path], place.base / "points", 2)
    assert found.codes == [0, 0], found.log[-3000:]
    points = []
    for rank in range(2):
        names = (place.base / f"points.{rank}").read_text().split("\n")[:-1]
        for name, group in groupby(enumerate(names, 1), key=lambda each: each[1]):
            numbers = [number for number, _ in group]
            points += [(rank, number, name) for number in sorted({numbers[0], numbers[-1]})]
    return points


def survive(place: Place, rank: int, number: int, point: str, clean: str) -> dict[str, Any]:
    name = told(rank, number, point)
    path = place.write(name, config(place, name))
    folder, fault = place.base / name, Fault("kill", POINT, number, (rank,))
    torn = ranks.run("distill", [path], folder, 2, [fault])
    again = ranks.run("distill", [path], folder, 2)
    same = again.codes == [0, 0] and digest(place, name) == clean
    struck = torn.struck == 1 and torn.codes[rank] == -9 and torn.codes[1 - rank] == 1
    codes = [torn.codes, again.codes]
    return {"passed": struck and same, "struck": struck, "same_bits": same, "codes": codes}
