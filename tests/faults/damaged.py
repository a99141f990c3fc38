"""Bits that flip and files that are cut, anywhere in a checkpoint: noticed before it is used."""

import json
import shutil
from pathlib import Path
from random import Random

from damage import cuts, flipped
from strikes import STEP, Fault

from faults import ranks
from faults.work import Figure, Work, config, share

DAMAGES, CLEAN = 200, 50


def measure(work: Work) -> list[Figure]:
    """Of a run that was killed in its second stage: a checkpoint, and the one it starts from."""
    place = work.place("damaged")
    path = place.write("run", config(place, "run"))
    found = ranks.run("distill", [path], place.base / "run", 2, [Fault("kill", STEP, 7)])
    assert found.struck == 2, found.log[-3000:]
    said = place.base / "said.json"
    words = [str(place.run("run")), str(said)]
    found = ranks.run("damages", words, place.base / "run", 1, limit=300)
    assert found.codes == [0], found.log[-3000:]
    damages, clean = json.loads(said.read_text())
    return [
        share("corruptions noticed before use", f"{DAMAGES} of {DAMAGES}", damages),
        share("whole checkpoints taken for whole", f"{CLEAN} of {CLEAN}", clean),
    ]


def damages(words: list[str]) -> int:
    """The program: what the resuming of a run says of each."""
    from mlkd_dist.config import UserError
    from mlkd_dist.engine import start, stop
    from mlkd_dist.saving import verify
    from mlkd_dist.saving.commit import Rejected

    run, said = Path(words[0]), Path(words[1])
    world, root, draw = start(), run / "checkpoints", Random(0)
    found = []
    for case, (path, wrong, what) in enumerate(wrongs(root, draw)):
        whole = path.read_bytes()
        path.write_bytes(wrong)
        try:
            verify.verified(root, world, "step-000006")
            reason = None
        except Rejected as error:
            reason = str(error)
        path.write_bytes(whole)
        found.append({"case": f"{case}: {what}", "passed": reason is not None, "said": reason})
    clean = []
    for case in range(CLEAN):
        # As a run does it that goes on; of a copy, since what is rejected is set aside.
        copy = said.parent / "copy"
        shutil.copytree(root, copy / "checkpoints")
        try:
            manifest = verify.newest(copy, copy / "checkpoints", world)
            reason = None if manifest["step"] == 6 else f"step {manifest['step']}"
        except UserError as error:
            reason = str(error)
        shutil.rmtree(copy)
        clean.append({"case": f"{case}", "passed": reason is None, "said": reason})
    said.write_text(json.dumps([found, clean]))
    stop()
    return 0


def wrongs(root: Path, draw: Random) -> list[tuple[Path, bytes, str]]:
    """Most are flips; the files take turns."""
    files = sorted(path for path in root.glob("step-00000[46]/**/*") if path.is_file())
    made = []
    for number in range(DAMAGES):
        path = files[number % len(files)]
        whole, name = path.read_bytes(), path.relative_to(root)
        if number // len(files) % 4 == 3:
            wrong = draw.choice(cuts(whole))
            made.append((path, wrong, f"{len(wrong)} of {len(whole)} bytes of {name}"))
        else:
            place, bit = draw.randrange(len(whole)), draw.randrange(8)
            made.append((path, flipped(whole, place, bit), f"bit {bit} of byte {place} of {name}"))
    return made
