"""What a run reads, in a few letters each: a run that goes on must find the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from mlkd_dist.config import resolve_path
from mlkd_dist.data import describe_tokenizer
from mlkd_dist.models.model import read_config
from mlkd_dist.run import Run

# Larger files are looked at in samples: a teacher of 100 GB would take minutes at every start.
WHOLE = 64 * 2**20
SAMPLES, SAMPLE = 64, 2**20
# Of a model folder, what its behaviour depends on.
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.py")


def fingerprints(run: Run, student_path: str) -> dict[str, str]:
    """By the setting that names it. Read by the first process alone."""
    trust = run.config.trust_remote_code
    found = {
        "student.path": model(student_path, trust),
        "data.train": run.train._fingerprint,
        "data.validation": run.held_out._fingerprint,
        "tokenizer": tokenizer(run.tokenizer),
    }
    if run.config.teacher.path is not None:
        found["teacher.path"] = model(run.config.teacher.path, trust)
    return found


def tokenizer(found: PreTrainedTokenizerBase) -> str:
    return short(json.dumps(describe_tokenizer(found), default=str))


def model(path: str, trust_remote_code: bool = False) -> str:
    """Of a folder all of its files; of a hub name the commit that is in the cache."""
    folder = Path(resolve_path(path))
    if not folder.is_dir():
        return str(read_config(path, trust_remote_code)._commit_hash)
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    return short("\n".join(f"{file.name} {content(file)}" for file in files))


def other_teacher(report: dict[str, Any], path: str | None) -> bool:
    """Whether a run that is done had another teacher than the folder now holds; one that is gone
    does not show."""
    told = report.get("teacher_fingerprint")
    there = path is not None and Path(resolve_path(path)).is_dir()
    return there and told is not None and told != model(path)


def content(path: Path) -> str:
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, lambda: digest).hexdigest()
        for sample in range(SAMPLES):
            file.seek(sample * (size - SAMPLE) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def short(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
