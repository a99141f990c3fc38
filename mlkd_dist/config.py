"""Every setting of a run, what it means, and what is allowed. Imports neither torch nor deepspeed.

A run's config is: the defaults below <- a YAML file <- `key=value` words of the command line.
Whatever is wrong with it is a UserError, one message that says what was given, what is allowed and
what to do.
"""

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mlkd_dist.rules.allowed import UserError, check_given
from mlkd_dist.saving.commit import write_whole


@dataclass
class RewindConfig:
    factor: float = 4.0
    """A logged loss/total of more than so many times the usual one is a spike. The usual one is the
    median of those of the last `window` steps."""
    window: int = 100
    """Steps that must have been logged before a loss is compared with them: of the same stage, with
    the same losses and layers."""
    at_most: int = 3
    """How often a run goes back; one more spike ends it."""


@dataclass
class RunConfig:
    dir: str = "runs/run"
    """Folder that receives everything the run writes."""
    seed: int = 0
    """Seed of data order, initialisation and dropout."""
    overwrite: bool = False
    """Replace a finished run in `dir`, or one with other settings; without it such a folder is
    refused. One that is not finished goes on."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint, with the same mathematics. changed: with other
    settings too. never: do not."""
    checkpoint_every: int | None = None
    """Optimizer steps between two checkpoints; without it time alone decides."""
    checkpoint_minutes: float | None = 15.0
    """Minutes between two checkpoints; null: checkpoint_every alone. One is also made at the end of
    each stage and when the run is stopped."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    save_in_background: bool = False
    """Within a stage, copy what a checkpoint holds to host memory and write it while training goes
    on; it counts once all processes have written. Takes 12 bytes of host memory a parameter, shared
    out over the processes."""
    evaluate_every: int | None = None
    """Optimizer steps of a stage between two evaluations of the student on the held-out rows; one
    more follows its last step. Does not change its weights. Default: none before the report."""
    export: str = "last"
    """Which student of the last stage becomes the run's export: last, or best by the task's own
    measure (accuracy, spearman, f1, perplexity) of those that evaluate_every has seen there."""
    time_limit: float | None = None
    """Minutes after its start at which the program saves, stops and exits with 75."""
    max_skipped: int = 10
    """So many steps in a row without a finite loss and gradient stop the run."""
    rewind: RewindConfig | None = None
    """After a spike of the loss, go back to the newest checkpoint of checkpoint_every before it and
    on from there, without the data of the steps that led to it. Default: do not. A teacher that is
    fine-tuned first never does."""
    compare_maps: bool = False
    """The report also tells how far the student's attention maps are from its teacher's, summed
    over layers, where both have as many heads."""


@dataclass
class LaunchConfig:
    processes: int = 1
    """Processes on this machine; with more than one `mlkd` starts the deepspeed launcher."""
    restarts: int = 20
    """How often `mlkd supervise` starts the run again at most."""
    timeout: float = 300.0
    """Seconds that a process waits for the others within a step, after the first one; then the run
    ends. While data are read, models evaluated or checkpoints written, it is two hours."""


@dataclass
class FinetuneConfig:
    steps: int | None = None
    """Optimizer steps; give either steps or epochs."""
    epochs: float | None = None
    """Passes over the training data; give either steps or epochs."""
    lr: float = 5e-5
    """Peak learning rate."""
    evaluate_every: int | None = None
    """As run.evaluate_every, of the fine-tuning."""
    export: str = "last"
    """As run.export: which of its states is the teacher."""
    dir: str | None = None
    """Run folder of the fine-tuning; default `<run.dir>-teacher`. A finished one made by the same
    settings is reused."""


@dataclass
class CacheConfig:
    dir: str = "???"
    """Folder of what the teacher said of the training rows: `mlkd cache` writes it, and training
    reads it in the teacher's place."""
    top_k: int | None = None
    """masked_lm and causal_lm: how many of a token's largest logits are kept, default 64; the
    others are one bucket."""


@dataclass
class TeacherConfig:
    path: str | None = None
    """Hugging Face folder, `package:NAME/sub/path`, or hub name."""
    finetune: FinetuneConfig | None = None
    """Fine-tune `path` on the task's labels first and distil from the result."""
    cache: CacheConfig | None = None
    """Train from what `mlkd cache` wrote of the teacher, which is then not in memory: for the loss
    soft_labels, and beside it those on hidden states."""
    dtype: str = "bf16"
    """Type of the weights: fp32, bf16, or fp16 for GPUs without bf16."""
    zero_stage: int = 3
    """0: every process holds the whole teacher. 3: its weights are sharded over the processes."""
    shard_group: str = "world"
    """Over which processes: world (all), or node (those of one node, each of which then holds a
    whole teacher; its weights cross no network). node needs zero_stage 3."""
    offload: str = "none"
    """Where sharded weights rest: none (on the device), cpu, or nvme (files in offload_dir). Needs
    zero_stage 3."""
    offload_dir: str | None = None
    """For offload nvme: a folder on a local disk of every machine."""
    attention: str = "sdpa"
    """Attention implementation that runs under the tap: sdpa, eager, flash_attention_2 or
    flash_attention_3."""


@dataclass
class FromTeacherConfig:
    layers: Any = None
    """How many teacher layers to keep, spread uniformly, or the list of their numbers (the first
    layer is 0)."""
    heads: int | None = None
    """Attention heads of the student; any number that divides its hidden size. Default: as the
    teacher."""
    hidden: int | None = None
    """Hidden size of the student. Narrower keeps the leading coordinates of every weight. Default:
    as the teacher."""


@dataclass
class LowRankConfig:
    keep: float = 0.5
    """Share of the numbers of all factorised matrices that their factors may have."""
    matrices: list[str] | None = None
    """Which of a layer's matrices: query, key, value, output, gate, up, down; default: all."""
    embeddings: bool = False
    """Factorise the word embeddings too; they then count in `keep`."""
    budget: str = "ratio"
    """ratio: the same share of each matrix. energy: ranks by the singular values of all matrices
    together, at the same total."""


@dataclass
class StudentConfig:
    path: str | None = None
    """Hugging Face folder, `package:NAME/sub/path`, or hub name; or make the student with
    from_teacher, low_rank or both."""
    from_teacher: FromTeacherConfig | None = None
    """Cut the student out of the teacher."""
    low_rank: LowRankConfig | None = None
    """Factorise the matrices of the teacher, or of what from_teacher cuts out of it."""
    dtype: str = "fp32"
    """Type of the weights in forward and backward: fp32, or bf16 with fp32 master weights."""
    zero_stage: int = 2
    """What DeepSpeed shards: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    offload: str = "none"
    """Where the optimizer state rests: none (on the device) or cpu. Needs zero_stage 1 to 3."""
    attention: str = "sdpa"
    """Attention implementation that runs under the tap: sdpa, eager, flash_attention_2 or
    flash_attention_3."""
    activation_checkpointing: str = "none"
    """none, or non_reentrant: recompute activations in the backward pass."""
    dropout: bool = True
    """Keep the dropout that the model's own config asks for; false turns it off."""


@dataclass
class GenerateConfig:
    rows: int = 128
    """How many held-out prompts are answered, the first ones; 0: none."""
    max_new_tokens: int = 128
    """Tokens of an answer at most; prompt and answer end at data.max_length, as completions do."""


@dataclass
class TaskConfig:
    kind: str = "embedding"
    """embedding, classification, regression, question_answering, masked_lm or causal_lm."""
    pooling: str | None = None
    """embedding: how a sentence vector is made: mean (default), cls or last."""
    labels: int | None = None
    """classification: number of classes; default: that of the teacher's head."""
    stride: int | None = None
    """question_answering: tokens by which two windows of a long passage overlap; default a third of
    data.max_length."""
    mask_probability: float | None = None
    """masked_lm: share of the tokens that are hidden (default 0.15)."""
    generate: GenerateConfig | None = None
    """causal_lm with prompts or chats: greedy answers to held-out prompts, for ROUGE-L. Default: as
    GenerateConfig says, with fewer tokens where the models have no more positions."""


@dataclass
class DataConfig:
    train: str = "???"
    """A .jsonl, .txt or .parquet file, `package:NAME/sub/path`, `builtin:python_docs`, or hub name
    `name:config@split`."""
    validation: str | None = None
    """Held-out text, as `train`; default: `validation_fraction` of the training rows."""
    validation_fraction: float = 0.05
    """Share of the training rows that is held out where `validation` is not given."""
    train_rows: int | None = None
    """How many of the training rows the student learns from: the same for every seed, those of a
    smaller number among those of a larger; default all. teacher.finetune takes all."""
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of the second text, for sentence pairs; for question_answering, of the passage."""
    label: str = "label"
    """Column of the class number; for regression, of the number; for question_answering, of the
    answers {"text": [...], "answer_start": [...]}."""
    prompt: str | None = None
    """causal_lm: column of a text that is read only; needs `completion`."""
    completion: str | None = None
    """causal_lm: column of the text that is learned, as what follows `prompt`."""
    messages: str | None = None
    """causal_lm: column of chats, lists of {role, content}; the assistant's turns are learned."""
    max_length: int = 128
    """Tokens after which a text is cut; a document of causal_lm goes on in the next sequence."""
    pack: bool = False
    """causal_lm: put several texts into one sequence of at most max_length tokens; none attends to
    another."""
    max_bad: float = 0.0
    """Bad rows that are left out, of train and of validation each: a share of its rows if under 1,
    else a number of rows; more of them end the run. 0: the first one does. Those left out are
    listed in quarantine.jsonl of the run folder."""
    workers: int = 0
    """Processes per rank that collate batches; 0 collates in the training process."""
    cache: str | None = None
    """Folder of the tokenised data; default $MLKD_CACHE, else ~/.cache/mlkd_dist."""


@dataclass
class OpenConfig:
    rule: str = "all"
    """Which layers' losses count: all; pid, those of one layer at a time, from the bottom up; sid,
    the same, and those of the layers before it stay. After the last layer come the losses without
    layers."""
    threshold: float | None = None
    """pid and sid: the next layer opens when the mean cls_cosine of the open ones falls below this;
    0: never before its turn. Default 0.05 (our reading), 0 without cls_cosine."""
    classifier: float | None = None
    """pid and sid: share of the steps that the losses without layers get at the end; the layers get
    equal parts of the rest. Default 1/(layers + 1)."""
    keep_soft_labels: bool | None = None
    """pid and sid: soft labels, and whatever loss has no layers, count from the first step on;
    default false: in the classifier's share only."""
    check_every: int | None = None
    """pid and sid: steps between two looks at the threshold, each of which waits for the device;
    default 10."""


@dataclass
class OnPolicyConfig:
    fraction: float = 0.5
    """Share of the steps, drawn by run.seed, that learn from answers to the prompts of their batch
    instead of its completions."""
    by: str = "student"
    """Who answers: student, as it is at that step, or teacher."""
    temperature: float = 1.0
    """Of the distribution that tokens are drawn from; 0: the most likely ones."""
    top_p: float = 1.0
    """Tokens are drawn from the most likely ones that hold this much of the probability."""
    max_new_tokens: int = 64
    """Tokens of an answer at most; prompt and answer end at data.max_length, as completions do."""


@dataclass
class StageConfig:
    name: str = "distill"
    """Name in logs."""
    steps: int | None = None
    """Optimizer steps; give either steps or epochs."""
    epochs: float | None = None
    """Passes over the training data; give either steps or epochs."""
    losses: dict[str, Any] = field(default_factory=dict)
    """Loss name -> its options; those of every loss are in TermConfig, its own in
    mlkd_dist/losses/<name>.py."""
    layers: Any = "uniform"
    """Layer map of this stage: uniform, last, or pairs [[student, teacher], ...] counted from 0."""
    open: OpenConfig | None = None
    """When the losses of which layers count; default: all of them at every step."""
    on_policy: OnPolicyConfig | None = None
    """causal_lm with prompts or chats: learn from generated answers too."""
    lr: float | None = None
    """Peak learning rate of this stage; default optim.lr."""


@dataclass
class TermConfig:
    """What can be said of any loss, beside its own options."""

    weight: float = 1.0
    """Factor of this loss in the sum."""
    layers: Any = None
    """Layer map of this loss; default: that of the stage."""
    sum_layers: str = "sum"
    """How layer pairs are put together: sum (our reading of the paper) or mean."""
    average: str = "sample"
    """How token rows are averaged: sample (mean in each sample, then over samples; our reading) or
    token."""
    project: str = "auto"
    """Learned map to the teacher's width: auto (only where the widths differ) or always."""
    shared_projection: bool = True
    """One map for all layers (our reading), or one per layer pair."""


@dataclass
class OptimConfig:
    lr: float = 5e-5
    """Peak learning rate."""
    warmup: float = 0.1
    """Warm-up: a share of the stage's steps if under 1, else a number of steps."""
    schedule: str = "linear"
    """linear (to 0), cosine (to 0) or constant, after the warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay; biases and norms have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""


@dataclass
class BatchConfig:
    micro_batch: int = 16
    """Samples per process and forward pass."""
    grad_accum: int = 1
    """Micro-batches per optimizer step."""
    evaluation: int = 32
    """Samples per process and forward pass when evaluating."""


@dataclass
class BenchConfig:
    rounds: int = 5
    """`mlkd bench`: how often floor, step and each loss are timed, one after the other."""
    steps: int = 2
    """`mlkd bench`: steps that are timed together, after one that is not."""
    out: str | None = None
    """`mlkd bench`: JSON file of the result; default `<run.dir>-bench.json`."""


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: list[StageConfig] = field(default_factory=list)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    log_every: int = 10
    """Optimizer steps between two log lines."""
    kernels: str = "auto"
    """Backend of the losses: auto, triton, streamed or eager."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Merged last into the DeepSpeed JSON of the student."""
    trust_remote_code: bool = False
    """Let model folders run their own Python code."""


def resolve_path(path: str) -> str:
    """`package:NAME/sub/path` as a path inside the installed package, and ~ as the home folder."""
    if not path.startswith("package:"):
        return os.path.expanduser(path)
    name, _, inside = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{path!r}: there is no installed Python package {name!r}; install it into this "
            f"environment."
        )
    found = Path(spec.submodule_search_locations[0]) / inside
    if not found.exists():
        raise UserError(f"{path!r}: the package {name!r} is installed but has no {inside!r}.")
    return str(found)


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Defaults <- YAML <- `key=value`, checked. Raises UserError."""
    given = read(path)
    for word in overrides:
        override(given, word)
    return from_mapping(given)


def read(path: str | Path) -> DictConfig:
    """Keys and values of a YAML file, as they stand there. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"config {str(path)!r}: no such file; give a YAML file as in configs/.")
    try:
        given = OmegaConf.load(path)
    except Exception as error:
        raise UserError(
            f"config {str(path)!r} is not YAML that can be read: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(given, DictConfig) or not given:
        raise UserError(
            f"config {str(path)!r} is empty or a list; it must hold keys and values as in configs/."
        )
    return given


def override(given: DictConfig, word: str) -> None:
    """Put one `key=value` of the command line in the place of what the YAML file gives for it."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(
            f"argument {word!r}: settings are given as key=value, for example optim.lr=1e-4."
        )
    try:
        parsed = OmegaConf.create(f"v: {value}").v if value else None
    except Exception as error:
        raise UserError(
            f"argument {word!r}: {value!r} is not a YAML value; put quotes around text with "
            f"colons or brackets in it."
        ) from error
    try:
        OmegaConf.update(given, key, parsed, merge=False, force_add=True)
    except Exception as error:
        raise UserError(
            f"argument {word!r}: there is no {key!r} in this config that can be set "
            f"({first_sentence(error)}); stages are counted from 0, as in stages[0].steps=5."
        ) from error


def from_mapping(given: Any) -> Config:
    """A checked Config of a mapping of keys."""
    try:
        given = OmegaConf.to_container(OmegaConf.create(given), resolve=True)
        check_given(given, Config)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    check(config)
    return config


def check(config: Config) -> None:
    """UserError for values, combinations or models that do not go together; see validate.py."""
    # Imported here since it needs the classes above.
    from mlkd_dist.rules.validate import validate

    validate(config)


def explain(error: Exception) -> str:
    """One sentence of an OmegaConf error."""
    key = getattr(error, "full_key", None) or "config"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: this key must be given, in the file or as {key}=..."
    return f"{key}: {first_sentence(error)}."


def first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


# First line of a config that a run has written, by which a run folder is known.
HEADER = "# Every setting of this run, written by mlkd_dist.\n"


def save(config: Config, path: Path) -> None:
    write_whole(path, HEADER + OmegaConf.to_yaml(OmegaConf.structured(config)))
