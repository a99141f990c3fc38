"""The only file that knows DeepSpeed: its start, sharded loading, the engines, whole weights."""

import ctypes
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

# Set before deepspeed is imported: it decides there which device it serves.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_log_level_from_string
from transformers.integrations import HfDeepSpeedConfig

from mlkd_dist.config import Config, UserError
from mlkd_dist.models.disk import Weights
from mlkd_dist.processes.network import free_port, name_interface
from mlkd_dist.processes.waiting import PATIENCE
from mlkd_dist.processes.world import World
from mlkd_dist.rules.allowed import nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Engine = deepspeed.DeepSpeedEngine


def start(patience: float = PATIENCE) -> World:
    """Join the processes that a launcher started, or be the only one; they wait for one another for
    so many seconds."""
    if "RANK" not in os.environ:
        alone = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        os.environ.update({key: str(value) for key, value in alone.items()})
    os.environ.setdefault("LOCAL_SIZE", os.environ["WORLD_SIZE"])
    set_log_level_from_string("error", deepspeed_logger)
    # DeepSpeed calls names that torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed's CPU build of this op takes a minute of g++ at every start and saves nothing that
    # we use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
        name_interface()
    deepspeed.init_distributed(
        "nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=patience),
    )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def keep_freed_memory(keep: bool = True) -> None:
    """Have glibc keep what is freed for the next tensor. By itself it takes every large tensor from
    the system anew and gives it back, and a fifth of a step goes to clearing pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0 if keep else 2**16)
        mallopt(trim_threshold, 2**31 - 1 if keep else 2**17)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """While open, at once: tensors that come and go would leave a heap as large as them all."""
    keep_freed_memory(False)
    try:
        yield
    finally:
        if not torch.cuda.is_available():
            keep_freed_memory()


def stop() -> None:
    # By DeepSpeed, which else would go on with groups of this world in the next.
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()


@contextmanager
def sharded_loading(
    zero_stage: int,
    ds_config: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    folder: str | None = None,
) -> Iterator[None]:
    """While open, `from_pretrained` shards what it loads if the stage is 3, over a group of
    processes or all, onto the disk where a folder is named. transformers keeps this setting in a
    process-wide weak reference, so it is held for one load only and cannot leak into the next
    model."""
    holder = HfDeepSpeedConfig(ds_config) if zero_stage == 3 else None
    own = holder is not None and (group is not None or folder is not None)
    try:
        with inside(group, ds_config, folder) if own else nullcontext():
            yield
    finally:
        del holder


@contextmanager
def inside(
    own: dist.ProcessGroup | None, ds_config: dict[str, Any], folder: str | None = None
) -> Iterator[None]:
    """While open, models are sharded over a group or all: of nested Inits, such as transformers'
    own, the outer one counts for DeepSpeed. transformers has the process of rank 0 read weights,
    and DeepSpeed hands on what the first of a group has; so in each group the first is rank 0."""
    rank = dist.get_rank

    def rank_inside(group: dist.ProcessGroup | None = None) -> int:
        return rank(own if group is None else group)

    settings = {"config_dict_or_path": ds_config, "data_parallel_group": own}
    if folder is None:
        init, memory = deepspeed.zero.Init(**settings), nullcontext()
    else:
        init, memory = OnDisk(Weights(folder), **settings), freed_memory_given_back()
    with init, memory:
        torch.distributed.get_rank = rank_inside
        try:
            yield
        finally:
            torch.distributed.get_rank = rank


class OnDisk(deepspeed.zero.Init):
    """Shards what is built inside it; the shares rest in `weights`."""

    def __init__(self, weights: Weights, **settings: object):
        super().__init__(**settings)
        self.weights = weights

    def _partition_param(self, param: nn.Parameter, *args: object, **kwargs: object) -> None:
        new = param.ds_tensor is None
        super()._partition_param(param, *args, **kwargs)
        if new:
            param.ds_tensor.data = self.weights.place(param.ds_tensor)


def frozen_config(dtype: str, zero_stage: int, offload: str) -> dict[str, Any]:
    # DeepSpeed's linear saves memory in a backward pass, which a frozen model has not, and would
    # replace torch's in the student too.
    zero: dict[str, Any] = {"stage": zero_stage, "memory_efficient_linear": False}
    if offload != "none":
        # To DeepSpeed a disk is mapped memory of the host.
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "steps_per_print": 10**9,
    }


def frozen_engine(model: nn.Module, ds_config: dict[str, Any]) -> Engine:
    """An engine without optimizer; it exists at ZeRO 0 and 3 only."""
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    engine.eval()
    return engine


def student_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON that the config stands for; `deepspeed:` is merged last."""
    student, batch = config.student, config.batch
    zero: dict[str, Any] = {"stage": student.zero_stage}
    if student.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    derived = {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.grad_accum,
        # DeepSpeed clips at 1.0 where nothing is said.
        "gradient_clipping": 0.0 if plain_optimizer(config) else config.optim.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": student.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return merged(derived, config.deepspeed)


def check_types(config: Config) -> None:
    """UserError for a type of weights that DeepSpeed does not run on this device. Without an
    engine, as a teacher at ZeRO 0, torch does."""
    device = deepspeed.get_accelerator()
    runs = {"fp32": True, "bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported()}
    for who, model in (("teacher", config.teacher), ("student", config.student)):
        engine = who == "student" or (model.path is not None and model.zero_stage > 0)
        if engine and not runs[model.dtype]:
            more = ", or teacher.zero_stage=0" if who == "teacher" else ""
            raise UserError(
                f"{who}.dtype: DeepSpeed does not run {model.dtype} on {device.device_name()} here;"
                f" use {', '.join(name for name in runs if runs[name])}{more}."
            )


class Asked(dict):
    """A dict that remembers which keys were asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def check_deepspeed(config: Config) -> None:
    """UserError for what DeepSpeed refuses in `deepspeed:`, and for keys that it never looks at:
    those it passes over without a word."""
    settings = Asked(student_config(config))
    try:
        DeepSpeedConfig(settings)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split(" [type=")[0].split())
        raise UserError(
            f"deepspeed: DeepSpeed refuses this block ({reason}); correct or remove that key."
        ) from error
    for key in config.deepspeed:
        if key not in settings.asked:
            raise UserError(
                f"deepspeed.{key}: DeepSpeed has no such key{nearest(key, sorted(settings.asked))};"
                f" remove it."
            )


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`extra` over `base`, also inside blocks."""
    out = dict(base)
    for key, value in extra.items():
        out[key] = (
            merged(out[key], value)
            if isinstance(value, dict) and isinstance(out.get(key), dict)
            else value
        )
    return out


def student_engine(
    module: nn.Module, config: Config, schedule: Callable[[torch.optim.Optimizer], Any], lr: float
) -> Engine:
    """The engine that trains `module`, with AdamW and a learning-rate schedule built from its
    optimizer."""
    trained = [p for p in module.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter lies empty between uses; ds_shape is what it is when gathered.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=tuple(config.optim.betas),
        eps=config.optim.eps,
        fused=True,
    )
    if plain_optimizer(config):
        clip_in_step(optimizer, trained, config.optim.grad_clip)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=schedule, config=student_config(config)
    )
    take_back_first_step(engine)
    return engine


def take_back_first_step(engine: Engine) -> None:
    """At ZeRO 0 with bf16 weights DeepSpeed 0.19.8 makes the moments by a step on gradients of
    zero, which counts as one and decays the weights."""
    wrapped = engine.optimizer
    if not hasattr(wrapped, "fp32_groups"):
        return
    wrapped.optimizer.state.clear()
    for ours, theirs in zip(wrapped.fp32_groups, wrapped.fp16_groups, strict=True):
        for exact, used in zip(ours, theirs, strict=True):
            exact.data.copy_(used.data)


def backward(engine: Engine, loss: Tensor) -> None:
    """Accumulate the gradient of `loss`, summed over processes and micro-batches.

    DeepSpeed averages over processes, hence the factor. The product is also a new tensor, and must
    be: given the forward's own output, DeepSpeed 0.19.8 at ZeRO 0 divides by the accumulation
    steps whatever `scale_wrt_gas` says. A loss that is not finite makes the whole gradient so, on
    which every optimizer here skips the step, on all processes.
    """
    sound = torch.where(loss.detach().isfinite(), 1.0, math.nan)
    engine.backward(loss * sound * dist.get_world_size(), scale_wrt_gas=False)


def plain_optimizer(config: Config) -> bool:
    """Whether DeepSpeed runs the optimizer as it is, without a wrapper of its own."""
    return config.student.zero_stage == 0 and config.student.dtype == "fp32"


def clip_in_step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], grad_clip: float
) -> None:
    """DeepSpeed clips for a plain optimizer too, but then forgets the norm and steps whatever it
    is. Done here, it finds norm and overflow where it looks for those of its own optimizers."""

    def clip(*_: Any) -> None:
        norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        optimizer.overflow = not bool(norm.isfinite())
        # By this AdamW is told to leave all as it is.
        optimizer.found_inf = torch.tensor(float(optimizer.overflow), device=norm.device)
        optimizer._global_grad_norm = norm

    optimizer.register_step_pre_hook(clip)


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """While open, weights that ZeRO-3 shards are whole, for reading. All processes open it."""
    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        yield


def whole_weights(module: nn.Module) -> dict[str, Tensor] | None:
    """The weights of a module on the first process, in CPU memory, gathered one by one where they
    are sharded. Every process must call this."""
    first = dist.get_rank() == 0
    weights = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with gathered([tensor]):
            if first:
                weights[name] = tensor.detach().cpu().clone()
    return weights if first else None
