"""A study: methods x seeds x budgets on one task. What it may say, and the runs it asks for."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlkd_dist import config as configs
from mlkd_dist.config import Config, StageConfig, UserError
from mlkd_dist.finetune import folder as teacher_folder
from mlkd_dist.finetune import with_finetuned_teacher
from mlkd_dist.rules.allowed import check_given, nearest, shown
from mlkd_dist.rules.settings import flat


@dataclass
class Study:
    """`base`, `methods` and `budgets` hold keys of a config with the value each gets, as on the
    command line of `mlkd distill`: `optim.lr: 1e-4`, `stages[0].steps: 5`, `student: {path: ...}`.
    """

    base: dict[str, Any]
    """What all runs share, a whole config: the file `config: PATH` (from this file's folder), and
    keys over it."""
    methods: dict[str, Any]
    """Name -> keys below `student` and `stages`. `config: PATH` takes both from a file, which must
    be as the base in all else. All methods train equally long."""
    budgets: dict[str, Any] = field(default_factory=lambda: {"all": None})
    """Name -> keys below `data`, `batch` and `optim`, for every method alike; the teacher is
    fine-tuned without them."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """run.seed of the runs; the teacher is fine-tuned once, with the base's."""
    baseline: str | None = None
    """Method with which the others are compared, seed by seed; default: the first."""
    dir: str = "runs/study"
    """Folder that receives the runs, the tables and the plots."""
    jobs: int = 1
    """Runs at a time; more than one only without a GPU."""
    overwrite: bool = False
    """Make finished runs of other settings again; without it they are refused."""


# What a method, and what a budget, may change.
METHOD_KEYS, BUDGET_KEYS = ("student", "stages"), ("data", "batch", "optim")
# What of the study may be set on the command line; other keys there are the base's.
WORDS = ("seeds", "baseline", "dir", "jobs", "overwrite")
# What each run gets from the study.
RUN_KEYS = ("dir", "seed", "overwrite", "resume")
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
# First line of the copy that is kept in the study's folder, by which that is known.
HEADER = "# The study of this folder, written by mlkd_dist.\n"


@dataclass(frozen=True)
class Planned:
    """One run of a study."""

    method: str
    budget: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.budget}/{self.method}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Plan:
    study: Study
    base: Config
    runs: list[Planned]
    differences: dict[str, dict[str, Any]]
    """Method -> what it changes of the base: key -> its value, None where it has none."""

    @property
    def folder(self) -> Path:
        return Path(self.study.dir)


def top(key: str) -> str:
    return re.split(r"[.\[=]", key, maxsplit=1)[0]


def plan(path: str | Path, words: list[str] = ()) -> Plan:
    """All runs of a study, every one's config checked. Raises UserError."""
    given, over_base = configs.read(path), []
    for word in words:
        if top(word) in get_type_hints(Study) and top(word) not in WORDS:
            raise UserError(
                f"argument {word!r}: {top(word)} is given in the study's file; settings of the "
                f"base are given as for `mlkd distill`, for example optim.lr=1e-4."
            )
        over_base.append(word) if top(word) not in WORDS else configs.override(given, word)
    study = read_study(given)
    here = Path(path).parent
    file, base = read_base(study, here, over_base)
    base_config = checked("base", base)
    # A teacher of other settings that is not finished is made anew; a finished one is refused.
    base_config.run.dir, base_config.run.overwrite = str(Path(study.dir) / "base"), True
    finetune = base_config.teacher.finetune
    if finetune is not None and finetune.dir is None:
        finetune.dir = str(Path(study.dir) / "teacher")
    methods = {
        name: method_changes(name, changes or {}, here, file)
        for name, changes in study.methods.items()
    }
    for name, changes in study.budgets.items():
        refuse_keys(f"budgets.{name}", changes or {}, BUDGET_KEYS, "methods and base")
    runs = planned(study, methods, base, base_config)
    differences = {
        name: differing(base, changed(f"methods.{name}", base, changes))
        for name, changes in methods.items()
    }
    return Plan(study, base_config, runs, differences)


def read_study(given: DictConfig) -> Study:
    try:
        found = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(configs.explain(error)) from error
    check_given(found, Study)
    for key in ("base", "methods"):
        if not found.get(key):
            raise UserError(f"{key}: this key must be given in the file of a study.")
    study = Study(**found)
    # A number may stand for text, as in any config.
    study.baseline = str(study.baseline or next(iter(study.methods)))
    study.dir = os.path.expanduser(str(study.dir))
    for key in ("methods", "budgets"):
        check_names(key, getattr(study, key))
    check_given(study.seeds, list[int], "seeds")
    if not study.seeds or min(study.seeds) < 0 or len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"seeds: {study.seeds} is not allowed; give different numbers from 0 up.")
    if study.baseline not in study.methods:
        raise UserError(
            f"baseline: {study.baseline!r} is no method{nearest(study.baseline, [*study.methods])};"
            f" use one of {', '.join(study.methods)}."
        )
    if study.jobs < 1:
        raise UserError(f"jobs: {study.jobs} is not allowed; give 1 or more.")
    if not study.dir.strip():
        raise UserError("dir: it is empty; give the folder that receives the study.")
    return study


def check_names(key: str, given: dict[str, Any]) -> None:
    if not given:
        raise UserError(f"{key}: none is given; give at least one name.")
    for name, changes in given.items():
        if not NAME.fullmatch(name):
            raise UserError(
                f"{key}: the name {name!r} is not allowed, since it names a folder; use letters, "
                f"digits and . _ + - in it."
            )
        if not (changes is None or isinstance(changes, dict)):
            raise UserError(
                f"{key}.{name}: {shown(changes)} is not allowed; give keys of a config "
                f"with their values, as in {{stages[0].steps: 5}}."
            )
    lower = [name.lower() for name in given]
    if len(set(lower)) < len(lower):
        raise UserError(
            f"{key}: names must differ in more than case, given {[*given]}; rename one."
        )


def read_base(study: Study, here: Path, words: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the base's file, or the base itself where it names none; the whole base)."""
    changes = dict(study.base)
    file = changes.pop("config", None)
    for key in [*words, *(changes if file is not None else ())]:
        if str(key).partition("=")[0] in ("run", *(f"run.{name}" for name in RUN_KEYS)):
            raise UserError(
                f"{key}: a study gives each run its own folder and seed; use dir, seeds and "
                f"overwrite."
            )
    start = from_file("base", here, file) if file is not None else {}
    base = changed("base", start, changes)
    wrapped = OmegaConf.create(base)
    for word in words:
        configs.override(wrapped, word)
    return start or base, OmegaConf.to_container(wrapped)


def from_file(where: str, here: Path, path: Any) -> dict[str, Any]:
    if not isinstance(path, str):
        raise UserError(f"{where}.config: {path!r} is not allowed; give the path of a YAML file.")
    try:
        return OmegaConf.to_container(configs.read(here / path), resolve=True)
    except UserError as error:
        raise UserError(f"{where}.config: {error}") from error


def changed(where: str, given: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`given` with each key of `changes` in the place of what stands there."""
    result = OmegaConf.create(given)
    for key, value in changes.items():
        try:
            configs.override(result, f"{key}={json.dumps(value)}")
        except UserError as error:
            raise UserError(f"{where}.{key}: {error}") from error
    return OmegaConf.to_container(result)


def checked(where: str, given: dict[str, Any]) -> Config:
    try:
        return configs.from_mapping(given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def planned(
    study: Study,
    methods: dict[str, dict[str, Any]],
    base: dict[str, Any],
    base_config: Config,
) -> list[Planned]:
    """Seeds change slowest: after the first of them each method has a figure."""
    runs, seen = [], {}
    for seed in study.seeds:
        for budget, of_budget in study.budgets.items():
            for method, changes in methods.items():
                where = f"methods.{method}" + (f" with budgets.{budget}" if of_budget else "")
                given = changed(f"budgets.{budget}", base, of_budget or {})
                config = checked(where, changed(f"methods.{method}", given, changes))
                check_length(method, config.stages, base_config.stages)
                same = seen.setdefault(repr((seed, config)), (budget, method))
                if same != (budget, method):
                    raise UserError(
                        f"{where}: all of its settings are those of {'/'.join(same)}; change or "
                        f"remove one of the two."
                    )
                runs.append(Planned(method, budget, seed, config))
                own_folder(runs[-1], study, base_config)
    return [
        Planned(run.method, run.budget, run.seed, with_finetuned_teacher(run.config))
        for run in runs
    ]


def own_folder(run: Planned, study: Study, base: Config) -> None:
    """Its folder and seed, and the teacher of all."""
    folder = Path(study.dir) / "runs" / run.name
    run.config.run.dir, run.config.run.seed = str(folder), run.seed
    run.config.run.overwrite, run.config.run.resume = True, "auto"
    if base.teacher.finetune is not None:
        run.config.teacher.finetune.dir = teacher_folder(base)


def method_changes(
    name: str, changes: dict[str, Any], here: Path, file: dict[str, Any]
) -> dict[str, Any]:
    """The keys of a method, with those of its file before them."""
    where, changes = f"methods.{name}", dict(changes)
    path = changes.pop("config", None)
    refuse_keys(where, changes, METHOD_KEYS, "base and budgets")
    if path is None:
        return changes
    theirs = from_file(where, here, path)
    ours, other = flat(file), flat(theirs)
    different = [
        key
        for key in sorted(ours.keys() | other.keys())
        if top(key) not in ("run", *METHOD_KEYS) and ours.get(key) != other.get(key)
    ]
    if different:
        raise UserError(
            f"{where}.config: {path!r} is not as the base in {', '.join(different)}; a method "
            f"changes {' and '.join(METHOD_KEYS)} alone, so that all have the same means."
        )
    return {key: theirs[key] for key in METHOD_KEYS if key in theirs} | changes


def refuse_keys(where: str, changes: dict[str, Any], allowed: tuple[str, ...], other: str) -> None:
    for key in changes:
        if top(str(key)) not in allowed:
            raise UserError(
                f"{where}.{key}: not allowed here; give keys below {', '.join(allowed)}. What "
                f"else there is belongs to {other}, so that all methods have the same means."
            )


def check_length(method: str, stages: list[StageConfig], base: list[StageConfig]) -> None:
    ours, theirs = length(stages), length(base)
    if ours != theirs:
        raise UserError(
            f"methods.{method}: its stages take {told(ours)} and the base's {told(theirs)}; "
            f"every method of a study trains as long as the base."
        )


def length(stages: list[StageConfig]) -> tuple[int, float]:
    """(steps, epochs) of all stages."""
    steps = sum(stage.steps or 0 for stage in stages)
    return steps, round(sum(stage.epochs or 0 for stage in stages), 6)


def told(length: tuple[int, float]) -> str:
    steps, epochs = length
    parts = [f"{steps} steps"] * bool(steps) + [f"{epochs:g} epochs"] * bool(epochs)
    return " and ".join(parts)


def differing(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The keys of `given` whose values `base` has not; a key that is gone has the value None, as
    one for all that was below it."""
    theirs, ours = flat(base), flat(given)
    found = {key: value for key, value in ours.items() if key not in theirs or theirs[key] != value}
    there = {part for key in ours for part in prefixes(key)}
    for key in theirs:
        gone = next((part for part in prefixes(key) if part not in there), None)
        if gone is not None:
            found[gone] = None
    return found


def prefixes(key: str) -> list[str]:
    """`a[0].b` -> `a`, `a[0]`, `a[0].b`."""
    return [key[: match.start()] for match in re.finditer(r"(?<=.)[.\[]|$", key)]
