"""What a checkpoint costs beside torch.save of the same tensors, on the same disk."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from faults import ranks
from faults.work import Figure, Work

WIDTH, MATRICES = 1024, 12
LIMIT = 1.10
WARM_UP = 3


def measure(work: Work) -> list[Figure]:
    folder = work.place("cost").base
    words = [str(folder), "3" if work.quick else "9"]
    found = ranks.run("cost", words, folder, 1, limit=500)
    assert found.codes == [0], found.log[-3000:]
    said = json.loads((folder / "said.json").read_text())
    ratio, size = said["ratio"], said["bytes"] / 2**20
    text = f"{ratio:.2f} ({size:.0f} MiB in {said['commit']:.2f} s, else {said['torch']:.2f} s)"
    met = ratio <= LIMIT
    case = {"case": "one process", "passed": met} | said
    name = "a checkpoint's time over torch.save and fsync of its tensors"
    return [Figure(name, f"{LIMIT} at most", text, met, [case])]


def compare(words: list[str]) -> int:
    """The program: both in turn, so that what else goes on touches both; medians."""
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from transformers import get_scheduler

    from mlkd_dist import config as configs
    from mlkd_dist import engine
    from mlkd_dist.checkpoint import Checkpoints, Position

    folder, rounds = Path(words[0]), int(words[1])
    world = engine.start()
    config = configs.Config()
    config.student.zero_stage = 2
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(MATRICES)))
    made = engine.student_engine(module, config, lambda o: get_scheduler("constant", o), 1e-3)
    engine.backward(made, made(torch.randn(4, WIDTH)).square().sum())
    made.step()
    checkpoints = Checkpoints(folder / "run", world, 2)

    def commit(number: int) -> None:
        checkpoints.save(Position(step=number), made, [], {})

    commit(1)
    whole = folder / "run" / "checkpoints" / "step-000001"
    tensors = load_file(whole / "rank-00000.safetensors")

    # As a run does that keeps two: a virtual disk is slower where it was never written.
    def plain(number: int) -> None:
        with (folder / f"{number}.pt").open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        (folder / f"{number - 2}.pt").unlink(missing_ok=True)

    seconds: dict[str, list[float]] = {"commit": [], "torch": []}
    for number in range(2, 2 + WARM_UP + rounds):
        turn = [("torch", plain), ("commit", commit)]
        for name, work in turn if number % 2 else reversed(turn):
            took = timed(work, number)
            seconds[name] += [took] if number >= 2 + WARM_UP else []
    said = {name: sorted(found)[rounds // 2] for name, found in seconds.items()}
    said |= {"ratio": said["commit"] / said["torch"], "seconds_of_each": seconds}
    said["bytes"] = sum(path.stat().st_size for path in whole.parent.glob("*/rank-*")) // 2
    (folder / "said.json").write_text(json.dumps(said))
    shutil.rmtree(folder / "run")
    engine.stop()
    return 0


def timed(work: Callable[[int], None], number: int) -> float:
    os.sync()
    begun = time.perf_counter()
    work(number)
    return time.perf_counter() - begun
