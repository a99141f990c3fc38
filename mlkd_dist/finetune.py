"""The run that makes a task's teacher: hard labels alone, with the same engine as any student."""

import copy
from pathlib import Path

from mlkd_dist import config as configs
from mlkd_dist.config import (
    Config,
    FinetuneConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    UserError,
)
from mlkd_dist.rules.settings import decisive, differences, read_back


def finetune_config(config: Config) -> Config:
    if config.teacher.path is None:
        raise UserError(
            "teacher.path: finetune trains this model; give a folder, package:NAME/path or hub "
            "name."
        )
    if config.task.kind == "embedding":
        raise UserError(
            "task.kind: the embedding task has no labels to train on; finetune needs another task."
        )
    settings = config.teacher.finetune or FinetuneConfig(epochs=1)
    own = copy.deepcopy(config)
    own.run.dir, own.run.compare_maps, own.data.train_rows = folder(config), False, None
    own.run.evaluate_every, own.run.export = settings.evaluate_every, settings.export
    own.run.rewind = None
    own.student = StudentConfig(path=config.teacher.path, attention=config.teacher.attention)
    own.student.zero_stage, own.student.dtype = config.student.zero_stage, config.student.dtype
    own.teacher = TeacherConfig(path=None, zero_stage=config.teacher.zero_stage)
    stage = StageConfig(
        name="finetune", steps=settings.steps, epochs=settings.epochs, lr=settings.lr
    )
    stage.losses = {"hard_labels": {}}
    own.stages = [stage]
    configs.check(own)
    return own


def folder(config: Config) -> str:
    """The run folder of the fine-tuning."""
    given = config.teacher.finetune.dir if config.teacher.finetune else None
    return given or f"{config.run.dir.rstrip('/')}-teacher"


def with_finetuned_teacher(config: Config) -> Config:
    """The same run with the fine-tuned model as its teacher, where it asks for one."""
    if config.teacher.finetune is None:
        return config
    config = copy.deepcopy(config)
    config.teacher.path, config.teacher.finetune = f"{folder(config)}/export", None
    return config


def finished(own: Config) -> bool:
    """Whether this fine-tuning is there already. UserError where the folder holds one made by other
    settings."""
    made = Path(own.run.dir)
    if not (made / "report.json").exists():
        return False
    theirs = read_back(made / "config.yaml")
    changed = ["config.yaml cannot be read"]
    if theirs is not None:
        changed = differences(decisive(theirs), decisive(own))
    if changed:
        raise UserError(
            f"teacher.finetune: {own.run.dir!r} holds a teacher that was fine-tuned with other "
            f"settings ({'; '.join(changed)}); remove that folder, or set teacher.finetune.dir to "
            f"another."
        )
    return True
