"""Checks of a whole config that need no weights and no torch: allowed values, keys that exclude
each other, the options of every loss, and what the models' config files say."""

import os
from pathlib import Path
from typing import Any

from mlkd_dist.config import Config, FinetuneConfig, LowRankConfig, RunConfig, UserError
from mlkd_dist.models.roles import ROLES
from mlkd_dist.rules.allowed import above, at_least, one_of, share
from mlkd_dist.rules.prompts import check_generate, check_on_policy
from mlkd_dist.rules.schema import loss_schema
from mlkd_dist.rules.shapes import check_shapes, model_shape, refuse_type
from mlkd_dist.rules.stage import check_length, check_stage
from mlkd_dist.rules.task import VOCABULARY, check_pack, check_task

ATTENTION = ["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
# What teacher.cache may hold of a teacher, as losses read it.
STORED = ("logits", "embedding", "hidden", "cls", "mean", "last")
# DeepSpeed keys that other keys of the config already decide.
OWNED = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.grad_accum",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "student.dtype",
    "fp16": "student.dtype",
    "activation_checkpointing": "student.activation_checkpointing",
    "amp": "student.dtype",
}
OWNED_ZERO = {"stage": "student.zero_stage", "offload_optimizer": "student.offload"}


def validate(config: Config) -> None:
    """Raises UserError; fills in the default of every option of every loss, and the home folder."""
    config.run.dir = os.path.expanduser(config.run.dir)
    check_values(config)
    check_deepspeed(config.deepspeed)
    check_task(config)
    check_finetune(config)
    check_folders(config)
    stages = config.stages
    if not stages:
        raise UserError(
            "stages: give at least one stage, for example [{steps: 100, losses: {hidden_mse: {}}}]."
        )
    if len({stage.name for stage in stages}) < len(stages):
        raise UserError(
            f"stages: names must differ, given {[stage.name for stage in stages]}; rename one."
        )
    for index, stage in enumerate(stages):
        check_stage(f"stages[{index}]", stage, config.task.kind)
        if config.kernels == "triton" and "attention_mse" in stage.losses:
            raise UserError(
                f"kernels: triton, but stages[{index}].losses.attention_mse has no Triton kernel; "
                f"use auto, which takes the fastest there is for each loss."
            )
    check_pack(config)
    check_generate(config)
    check_on_policy(config)
    check_compare_maps(config)
    check_cache(config)
    check_models(config)


def check_values(config: Config) -> None:
    for who, model in (("teacher", config.teacher), ("student", config.student)):
        one_of(f"{who}.attention", model.attention, ATTENTION)
    one_of("teacher.dtype", config.teacher.dtype, ["fp32", "bf16", "fp16"])
    one_of("student.dtype", config.student.dtype, ["fp32", "bf16"])
    one_of("teacher.offload", config.teacher.offload, ["none", "cpu", "nvme"])
    one_of("student.offload", config.student.offload, ["none", "cpu"])
    if (config.teacher.offload == "nvme") != (config.teacher.offload_dir is not None):
        raise UserError(
            "teacher.offload_dir: goes with offload: nvme and nothing else; name a folder on a "
            "local disk of every machine for nvme, or leave it out."
        )
    if config.teacher.zero_stage not in (0, 3):
        raise UserError(
            f"teacher.zero_stage: {config.teacher.zero_stage} is not allowed; a frozen teacher "
            f"has no optimizer and no "
            "gradients to shard, so use 0 (whole on every process) or 3 (weights sharded)."
        )
    one_of("student.zero_stage", config.student.zero_stage, [0, 1, 2, 3])
    one_of("teacher.shard_group", config.teacher.shard_group, ["world", "node"])
    if config.teacher.shard_group == "node" and config.teacher.zero_stage == 0:
        raise UserError(
            "teacher.shard_group: node needs sharding; set teacher.zero_stage=3, or leave it out: "
            "at zero_stage 0 every process has the whole teacher."
        )
    for who, model in (("teacher", config.teacher), ("student", config.student)):
        if model.offload != "none" and model.zero_stage == 0:
            raise UserError(
                f"{who}.offload: {model.offload} needs sharding; set {who}.zero_stage=3 or "
                f"{who}.offload=none."
            )
    if config.student.activation_checkpointing == "reentrant":
        raise UserError(
            "student.activation_checkpointing: reentrant checkpointing drops the gradient of "
            "every loss on inner "
            "layers without a word; use non_reentrant or none."
        )
    one_of(
        "student.activation_checkpointing",
        config.student.activation_checkpointing,
        ["none", "non_reentrant"],
    )
    one_of("optim.schedule", config.optim.schedule, ["linear", "cosine", "constant"])
    one_of("kernels", config.kernels, ["auto", "triton", "streamed", "eager"])
    one_of("run.resume", config.run.resume, ["auto", "changed", "never"])
    for key, value, low in (
        ("launch.processes", config.launch.processes, 1),
        ("launch.restarts", config.launch.restarts, 0),
        ("batch.micro_batch", config.batch.micro_batch, 1),
        ("batch.grad_accum", config.batch.grad_accum, 1),
        ("batch.evaluation", config.batch.evaluation, 1),
        ("bench.rounds", config.bench.rounds, 1),
        ("bench.steps", config.bench.steps, 1),
        ("log_every", config.log_every, 1),
        ("run.seed", config.run.seed, 0),
        ("run.keep_checkpoints", config.run.keep_checkpoints, 1),
        ("run.max_skipped", config.run.max_skipped, 1),
        ("optim.lr", config.optim.lr, 0),
        ("optim.warmup", config.optim.warmup, 0),
        ("optim.weight_decay", config.optim.weight_decay, 0),
        ("optim.grad_clip", config.optim.grad_clip, 0),
        ("data.max_length", config.data.max_length, 4),
        ("data.workers", config.data.workers, 0),
    ):
        at_least(key, value, low)
    for key in ("checkpoint_every", "checkpoint_minutes", "time_limit"):
        if (value := getattr(config.run, key)) is not None:
            above(f"run.{key}", value, 0)
    check_evaluation("run", config.run)
    check_rewind(config)
    above("launch.timeout", config.launch.timeout, 0)
    share("data.validation_fraction", config.data.validation_fraction)
    if config.data.train_rows is not None:
        at_least("data.train_rows", config.data.train_rows, 1)
    at_least("data.max_bad", config.data.max_bad, 0)
    if config.data.max_bad > 1 and config.data.max_bad % 1:
        raise UserError(
            f"data.max_bad: {config.data.max_bad} is not allowed; give a share of the rows below "
            f"1, or a whole number of rows."
        )
    above("optim.eps", config.optim.eps, 0)
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(
            f"optim.betas: {betas} is not allowed; give two numbers from 0 to below 1, as in "
            f"[0.9, 0.999]."
        )


def check_evaluation(where: str, given: RunConfig | FinetuneConfig) -> None:
    one_of(f"{where}.export", given.export, ["last", "best"])
    if given.evaluate_every is not None:
        at_least(f"{where}.evaluate_every", given.evaluate_every, 1)
    elif given.export == "best":
        raise UserError(
            f"{where}.export: best is the best of those that were evaluated; set "
            f"{where}.evaluate_every to a number of steps, or use last."
        )


def check_rewind(config: Config) -> None:
    rewind, every = config.run.rewind, config.run.checkpoint_every
    if rewind is None:
        return
    above("run.rewind.factor", rewind.factor, 1)
    at_least("run.rewind.at_most", rewind.at_most, 1)
    at_least("run.rewind.window", rewind.window, config.log_every)
    if every is None or every < config.log_every:
        raise UserError(
            f"run.rewind: a run goes back to checkpoints that are some number of steps apart, not "
            f"some minutes; set run.checkpoint_every, now {every}, to log_every "
            f"({config.log_every}) or more."
        )
    if config.teacher.cache is not None and config.task.kind == "masked_lm":
        raise UserError(
            "run.rewind: data that are skipped make later epochs, and of masked_lm teacher.cache "
            "holds as many as the stages need without; remove run.rewind, or teacher.cache."
        )


def check_deepspeed(extra: dict[str, Any]) -> None:
    for key, ours in OWNED.items():
        if key in extra:
            raise UserError(
                f"deepspeed.{key}: this is set by {ours}; remove it here and set it there."
            )
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(
            f"deepspeed.zero_optimization: {zero!r} is not allowed; give keys and values, and the "
            f"stage as student.zero_stage."
        )
    for key, ours in OWNED_ZERO.items():
        if key in zero:
            raise UserError(
                f"deepspeed.zero_optimization.{key}: this is set by {ours}; remove it here and "
                f"set it there."
            )


def check_folders(config: Config) -> None:
    """The run folder may be replaced, so nothing that the run needs lies in it."""
    if not config.run.dir.strip():
        raise UserError("run.dir: it is empty; give the folder that receives the run.")
    folder = Path(config.run.dir).resolve()
    finetune = config.teacher.finetune
    read = {
        "teacher.path": config.teacher.path,
        "student.path": config.student.path,
        "data.train": config.data.train,
        "data.validation": config.data.validation,
    }
    written = {
        "data.cache": config.data.cache,
        "teacher.cache.dir": config.teacher.cache.dir if config.teacher.cache else None,
        "teacher.finetune.dir": finetune.dir if finetune else None,
    }
    for key, path in (read | written).items():
        if path is None or ":" in path:
            continue
        place = Path(path).expanduser().resolve()
        # What is not there may be a hub name.
        if place.is_relative_to(folder) and (key in written or place.exists()):
            raise UserError(
                f"{key}: {path!r} lies in run.dir ({config.run.dir!r}), which the run writes "
                f"anew; choose another run.dir."
            )
        if key == "teacher.finetune.dir" and folder.is_relative_to(place):
            raise UserError(
                f"run.dir: {config.run.dir!r} lies in teacher.finetune.dir ({path!r}), which the "
                f"fine-tuning writes anew; choose another run.dir."
            )


def check_finetune(config: Config) -> None:
    finetune = config.teacher.finetune
    if finetune is None:
        return
    if config.task.kind == "embedding":
        raise UserError(
            "teacher.finetune: the embedding task has no labels to train on; remove it."
        )
    check_length("teacher.finetune", finetune)
    at_least("teacher.finetune.lr", finetune.lr, 0)
    check_evaluation("teacher.finetune", finetune)


def check_compare_maps(config: Config) -> None:
    if not config.run.compare_maps:
        return
    if config.teacher.path is None:
        raise UserError("run.compare_maps: there is no teacher to compare with; remove it.")
    if config.data.pack:
        raise UserError(
            "run.compare_maps: attention maps of packed sequences are not compared; use "
            "data.pack=false, or remove it."
        )


def check_cache(config: Config) -> None:
    """That what is stored of a teacher is all that the losses read of it. Fills in top_k."""
    cache = config.teacher.cache
    if cache is None:
        return
    if not cache.dir.strip():
        raise UserError("teacher.cache.dir: it is empty; name the folder of the cache.")
    cache.dir = os.path.expanduser(cache.dir)
    read = False
    for index, stage in enumerate(config.stages):
        for name in stage.losses:
            schema = loss_schema(name)
            reads = set(schema.read_by(stage.losses[name])) if schema.teacher else set()
            if unheld := sorted(reads - set(STORED)):
                raise UserError(
                    f"stages[{index}].losses.{name}: it reads the teacher's "
                    f"{', '.join(unheld)}, and teacher.cache holds {', '.join(STORED)} only; "
                    f"remove this loss, or leave the teacher live with teacher.cache=null."
                )
            read |= "logits" in reads
            if "logits" in reads and config.kernels == "triton" and config.task.kind in VOCABULARY:
                raise UserError(
                    f"kernels: triton, but stages[{index}].losses.{name} has no Triton kernel for "
                    f"the logits in teacher.cache; use auto, which takes the fastest there is for "
                    f"each loss."
                )
    if not read:
        raise UserError(
            "teacher.cache: no loss reads the teacher's logits; add soft_labels, or remove "
            "teacher.cache."
        )
    if config.task.kind in VOCABULARY:
        cache.top_k = 64 if cache.top_k is None else cache.top_k
        at_least("teacher.cache.top_k", cache.top_k, 1)
    elif cache.top_k is not None:
        raise UserError(
            f"teacher.cache.top_k: only for tasks over a vocabulary ({', '.join(VOCABULARY)}), "
            f"given with {config.task.kind}, of which all logits are kept; remove it."
        )


def check_low_rank(given: LowRankConfig) -> None:
    """Its values; whether the model has such matrices is known with the model."""
    share("student.low_rank.keep", given.keep)
    one_of("student.low_rank.budget", given.budget, ["ratio", "energy"])
    if given.matrices is not None and not given.matrices:
        raise UserError(
            f"student.low_rank.matrices: [] is not allowed; name some of {', '.join(ROLES)}, or "
            f"leave it out for all."
        )
    for role in given.matrices or []:
        one_of("student.low_rank.matrices", role, list(ROLES))


def check_models(config: Config) -> None:
    student = config.student
    made = [key for key in ("from_teacher", "low_rank") if getattr(student, key) is not None]
    if (student.path is None) == (not made):
        raise UserError(
            f"student: give either path or {made[-1] if made else 'from_teacher'}, "
            f"{'both' if made else 'neither'} is given."
        )
    if student.low_rank is not None:
        check_low_rank(student.low_rank)
    needed = bool(made) or any(
        loss_schema(name).teacher for stage in config.stages for name in stage.losses
    )
    if needed and config.teacher.path is None:
        raise UserError(
            "teacher.path: this run learns from a teacher; give a folder, package:NAME/path or "
            "hub name."
        )
    teacher = model_shape(config.teacher.path) if config.teacher.path else None
    student = model_shape(config.student.path) if config.student.path else None
    for key, shape in (("teacher.path", teacher), ("student.path", student)):
        if shape is not None:
            refuse_type(key, shape.type)
    check_shapes(config, teacher, student)
