"""A folder of small runs whose ends are compared: their weights, logs and checkpoints."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
import yaml
from conftest import logged, run_config
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

TWO_STAGES = [
    {"name": "one", "steps": 4, "losses": {"hidden_mse": {}, "attention_relation": {"splits": 2}}},
    {"name": "two", "steps": 5, "losses": {"hidden_mse": {}, "soft_labels": {}}},
]
TIMING = {"rows_per_s", "teacher_share", "peak_gib"}


class Place:
    """Configs of runs in a folder, and what was said of each."""

    def __init__(self, base: Path, teacher: Path, data: dict[str, str]):
        self.base, self.teacher, self.data = base, teacher, data

    def config(self, name: str, **changes: object) -> dict:
        """A run of two stages with a checkpoint every other step; 17 rows in batches of 4 are 5
        steps an epoch, so that the kills fall into an epoch and across its end."""
        folder = self.base / name
        folder.mkdir(exist_ok=True)
        config = run_config(
            folder, self.teacher, self.data, stages=TWO_STAGES, log_every=2, **changes
        )
        config["run"] |= {"checkpoint_every": 2, "checkpoint_minutes": None}
        config["data"]["cache"] = str(self.base / "cache")
        return config

    def write(self, name: str, config: dict) -> str:
        path = self.base / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    def run(self, name: str) -> Path:
        return self.base / name / "run"

    def copy(self, source: str, name: str) -> None:
        shutil.copytree(self.run(source), self.run(name))

    def said(self, name: str) -> list[str]:
        return json.loads((self.base / f"{name}.said").read_text())

    def starts(self, name: str) -> list[int]:
        """The steps that it went on from."""
        log = (self.base / "rank0.log").read_text()
        return [int(n) for n in re.findall(rf"/{name}/run': resuming from step (\d+)", log)]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return weights(self.run(name) / "export")

    def logs(self, name: str) -> list[dict]:
        rows = logged({"run": {"dir": self.run(name)}})
        return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]

    def steps_on_the_board(self, name: str, tag: str = "loss/total") -> list[int]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.run(name) / "tb"))
        events.Reload()
        return [event.step for event in events.Scalars(tag)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    # Under ZeRO 3 transformers writes norms by their old names, so these are read as it reads them.
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def digest(place: Place, name: str) -> str:
    """Of what a run leaves: the bits of its student, and its logs."""
    found = hashlib.sha256(json.dumps(place.logs(name)).encode())
    for path in sorted((place.run(name) / "export").glob("*.safetensors")):
        for key, tensor in sorted(load_file(path).items()):
            found.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
