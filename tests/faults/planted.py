"""Files with code in them, where a run reads. Each plant returns the config to run, and what a
program that trusted the file would do; a marker tells whether the code ran."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from conftest import BERT, made_tokenizer, stored_config, write_model
from places import Place
from transformers import AutoModelForCausalLM, LlamaConfig

from faults.work import config
from mlkd_dist.config import HEADER
from mlkd_dist.saving import commit

# Given the place, the name of the case and the marker.
Plant = Callable[[Place, str, Path], tuple[dict[str, Any], Callable[[], object]]]
# A run of one process that was killed in its second stage; the cases begin with copies.
MADE = "made"


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def pickled(path: Path, marker: Path) -> Callable[[], object]:
    """In torch's format, as its own checkpoints are."""
    torch.save({"weight": Payload(marker)}, path)
    copy = path.with_name(f"{path.name}.copy")
    shutil.move(shutil.copy(path, copy), marker.with_suffix(".copy"))
    return lambda: torch.load(marker.with_suffix(".copy"), weights_only=False)


def forged(folder: Path) -> None:
    """A manifest that fits what was planted."""
    manifest = commit.read_manifest(folder)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != commit.MANIFEST]
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size, "xxh3": commit.file_hash(path)
        }
        for path in files
    }  # fmt: skip
    manifest.pop("format")
    (folder / commit.MANIFEST).write_text(commit.manifest_text(manifest))


def in_checkpoint(step: int, file: str, instead: str | None = None) -> Plant:
    def plant(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
        found = config(place, name)
        place.copy(MADE, name)
        root = place.run(name) / "checkpoints"
        if step == 4:
            shutil.rmtree(root / "step-000006")
        folder = root / commit.step_name(step)
        if instead:
            (folder / instead).unlink()
        trusting = pickled(folder / file, marker)
        forged(folder)
        return found, trusting

    return plant


def teacher(place: Place, name: str) -> Path:
    return Path(shutil.copytree(place.teacher, place.base / name / "teacher"))


def pickled_weights(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
    found, folder = config(place, name), teacher(place, name)
    (folder / "model.safetensors").unlink()
    found["teacher"]["path"] = str(folder)
    return found, pickled(folder / "pytorch_model.bin", marker)


def remote_code(file: str, entry: dict[str, Any]) -> Plant:
    def plant(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
        found, folder = config(place, name), teacher(place, name)
        code = f"open({str(marker)!r}, 'w').close()\n"
        (folder / "planted.py").write_text(code)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))
        found["teacher"]["path"] = str(folder)
        return found, lambda: exec(code)

    return plant


def tag(marker: Path) -> str:
    return f"!!python/object/apply:os.mknod [{str(marker)!r}]"


def config_with_a_tag(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
    found = config(place, name)
    found["run"]["seed"] = f"TAG {marker}"
    return found, lambda: yaml.unsafe_load(tag(marker))


def run_with_a_tag(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
    found = config(place, name)
    place.copy(MADE, name)
    path = place.run(name) / "config.yaml"
    path.write_text(f"{HEADER}run: {tag(marker)}\n")
    return found, lambda: yaml.unsafe_load(tag(marker))


def tokenised_data(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
    found = config(place, name)
    cache = shutil.copytree(place.base / "cache", place.base / name / "cache")
    found["data"]["cache"] = str(cache)
    for path in sorted(Path(cache).rglob("*.arrow")):
        trusting = pickled(path, marker)
    return found, trusting


def rows_in_a_pickle(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
    found, path = config(place, name), place.base / name / "train.pkl"
    path.write_bytes(pickle.dumps(Payload(marker)))
    found["data"]["train"] = str(path)
    return found, lambda: pickle.loads(path.read_bytes())


def teacher_cache(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
    folder = place.base / name
    found = stored_config(folder, place.teacher, place.data, "classification")
    shutil.copytree(place.base / "stored" / "stored", folder / "stored")
    trusting = pickled(folder / "stored" / "index.safetensors", marker)
    forged(folder / "stored")
    return found, trusting


def chat_template(place: Place, name: str, marker: Path) -> tuple[dict, Callable]:
    folder = place.base / name
    found = config(place, name)
    llama = LlamaConfig(**BERT, num_key_value_heads=2)
    write_model(folder / "teacher", llama, AutoModelForCausalLM)
    code = f"cycler.__init__.__globals__.os.mknod({str(marker)!r})"
    code = "{{ " + code + " }}"
    made_tokenizer(folder / "tokenizer", code).save_pretrained(folder / "teacher")
    chat = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"chat": chat}) + "\n" for _ in "12345"))
    found["teacher"]["path"] = str(folder / "teacher")
    found["student"]["from_teacher"] = {"layers": 2}
    found["task"] = {"kind": "causal_lm"}
    found["data"] |= {"train": str(folder / "chats.jsonl"), "messages": "chat"}
    found["data"] |= {"validation": None, "validation_fraction": 0.4}
    found["stages"] = [{"name": "one", "steps": 2, "losses": {"soft_labels": {}}}]
    return found, lambda: jinja2.Environment().from_string(code).render()


AUTO_CONFIG = {"auto_map": {"AutoConfig": "planted.C"}, "model_type": "planted"}
AUTO_MODEL = {"auto_map": {"AutoModelForSequenceClassification": "planted.M"}}
AUTO_TOKENIZER = {"auto_map": {"AutoTokenizer": [None, "planted.T"]}, "tokenizer_class": "T"}

PLANTS: dict[str, Plant] = {
    "optimizer state of a checkpoint": in_checkpoint(6, "rank-00000.safetensors"),
    "projections of a checkpoint": in_checkpoint(4, "projections.safetensors"),
    "student of a checkpoint": in_checkpoint(4, "export/model.safetensors"),
    "pytorch_model.bin in a checkpoint": in_checkpoint(
        4, "export/pytorch_model.bin", "export/model.safetensors"
    ),
    "pytorch_model.bin of a teacher": pickled_weights,
    "remote code of a teacher's config": remote_code("config.json", AUTO_CONFIG),
    "remote code of a teacher": remote_code("config.json", AUTO_MODEL),
    "remote code of a tokenizer": remote_code("tokenizer_config.json", AUTO_TOKENIZER),
    "a tag in a config": config_with_a_tag,
    "a tag in the config of a run folder": run_with_a_tag,
    "tokenised data": tokenised_data,
    "rows in a pickle": rows_in_a_pickle,
    "logits of a teacher": teacher_cache,
    "a chat template": chat_template,
}
