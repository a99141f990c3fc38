"""Which settings decide a result, and which a run may change while it goes on: those that leave its
mathematics alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mlkd_dist.config import Config

# How a run is launched, laid out, saved and shown. A checkpoint knows the global batch, which the
# number of processes is a part of, and fingerprints of what the paths hold.
FREE = (
    "run",
    "launch",
    "bench",
    "log_every",
    "kernels",
    "trust_remote_code",
    "batch",
    "data.max_bad",
    "task.generate",
    "data.workers",
    "data.cache",
    "teacher.zero_stage",
    "teacher.shard_group",
    "teacher.offload",
    "teacher.offload_dir",
    "teacher.attention",
    "teacher.finetune",
    "teacher.cache.dir",
    "student.zero_stage",
    "student.offload",
    "student.attention",
    "student.activation_checkpointing",
)
PATHS = ("teacher.path", "student.path", "data.train", "data.validation")
BATCH = "processes x batch.micro_batch x batch.grad_accum"


def mathematics(config: Config) -> dict[str, Any]:
    """Every setting that the trained student depends on, by its key, but for paths and batch."""
    settings = flat(asdict(config))
    free = {key for key in settings if key in PATHS or any(below(key, name) for name in FREE)}
    settings = {key: value for key, value in settings.items() if key not in free}
    settings |= {"run.seed": config.run.seed}
    if config.run.rewind is None:
        return settings
    # When a run goes back, and to where.
    settings |= flat({"run.rewind": asdict(config.run.rewind)})
    return settings | {
        "run.checkpoint_every": config.run.checkpoint_every,
        "log_every": config.log_every,
    }


def global_batch(config: Config, processes: int) -> dict[str, int]:
    return {BATCH: processes * config.batch.micro_batch * config.batch.grad_accum}


def decisive(config: Config) -> dict[str, Any]:
    """Every setting that a run's export depends on."""
    found = mathematics(config) | paths(config) | global_batch(config, config.launch.processes)
    found["run.export"] = config.run.export
    if config.run.export == "best":
        found["run.evaluate_every"] = config.run.evaluate_every
    return found


def below(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))


def paths(config: Config) -> dict[str, Any]:
    settings = flat(asdict(config))
    return {key: settings[key] for key in PATHS}


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """`{"stages[0].losses.soft_labels.weight": 1.0, ...}`; lists of plain values stay lists."""
    if isinstance(value, dict) and value:
        parts = {f"{key}.{name}" if key else name: part for name, part in value.items()}
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = {f"{key}[{i}]": part for i, part in enumerate(value)}
    else:
        return {key: value}
    return {name: leaf for at, part in parts.items() for name, leaf in flat(part, at).items()}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """`key: before -> now` for all that differs."""
    absent = "absent"
    return [
        f"{key}: {theirs.get(key, absent)} -> {ours.get(key, absent)}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, absent) != ours.get(key, absent)
    ]


def read_back(path: Path) -> Config | None:
    """A config that a run has written, without the checks of one that a person writes: what it
    names may have moved. None where this version cannot read it."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        return OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError):
        return None
