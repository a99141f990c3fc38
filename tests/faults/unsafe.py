"""Files with code in them, where a run reads: none of it runs."""

import re
from pathlib import Path
from typing import Any

from conftest import stored_config
from places import Place
from strikes import STEP, Fault

from faults import ranks
from faults.planted import MADE, PLANTS, tag
from faults.work import Figure, Work, case, config, share


def measure(work: Work) -> list[Figure]:
    place = work.place("unsafe")
    made = place.write(MADE, config(place, MADE))
    found = ranks.run("distill", [made], place.base / MADE, 1, [Fault("kill", STEP, 7)])
    assert found.codes == [-9], found.log[-3000:]
    stored = stored_config(place.base / "stored", place.teacher, place.data, "classification")
    words = ["--command", "cache", place.write("stored", stored)]
    found = ranks.run("distill", words, place.base / "stored", 1)
    assert found.codes == [0], found.log[-3000:]
    cases = [case(place, name, lambda n=name: opened(place, n)) for name in work.some([*PLANTS], 5)]
    figure = share("planted files whose code did not run", f"{len(cases)} of {len(cases)}", cases)
    return [figure]


def opened(place: Place, name: str) -> dict[str, Any]:
    """Passed where no code ran; whether the run refused the file, did without it, or failed."""
    (place.base / name).mkdir()
    marker = place.base / name / "ran"
    given, trusting = PLANTS[name](place, name, marker)
    trusting()
    assert marker.exists(), "what is planted does nothing"
    marker.unlink()
    path = Path(place.write(name, given))
    tagged = re.sub(r"TAG (\S+)", lambda found: tag(Path(found[1])), path.read_text())
    path.write_text(tagged)
    found = ranks.run("distill", [str(path)], place.base / name, 1)
    ran = marker.exists()
    said = [line for line in found.log.splitlines() if line.startswith("mlkd: ")]
    how = {0: "not read", 2: "refused"}.get(found.codes[0], "failed")
    last = said[-1:] if how != "failed" else found.log.strip().splitlines()[-1:]
    return {"passed": not ran and None not in found.codes, "ran": ran, "how": how, "said": last}
