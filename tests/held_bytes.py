"""What DeepSpeed's student engine holds on the first of N processes, N being torch's fake process
group: `held_bytes.py N`. One line of JSON per ZeRO stage and type."""

import gc
import json
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import get_scheduler

from mlkd_dist import config as configs
from mlkd_dist import engine

WORLD = int(sys.argv[1])
# With LOCAL_SIZE of the world DeepSpeed waits for peers that do not exist.
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(WORLD), LOCAL_SIZE="1")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
warnings.simplefilter("ignore")
BUCKET = 300_000


def held() -> int:
    """Bytes of all tensors that live, shared memory once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if not isinstance(thing, torch.Tensor):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(zero_stage: int, dtype: str) -> dict[str, object]:
    config = configs.Config()
    config.student.zero_stage, config.student.dtype = zero_stage, dtype
    config.deepspeed = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    if zero_stage == 3:
        config.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    before = held()
    matrices = [nn.Linear(512, 512, bias=False) for _ in range(8)]
    module = nn.Sequential(*matrices).to(engine.DTYPES[dtype])
    made = engine.student_engine(module, config, lambda o: get_scheduler("constant", o), 1e-3)
    x = torch.randn(4, 512, dtype=engine.DTYPES[dtype])
    for _ in range(2):
        engine.backward(made, made(x).float().square().sum())
        with_gradients = held() - before
        made.step()
    found = {"zero_stage": zero_stage, "dtype": dtype, "with_gradients": with_gradients}
    found |= {"rests": held() - before, "parameters": 8 * 512 * 512, "bucket": BUCKET}
    made.destroy()
    return found


dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
engine.set_log_level_from_string("error", engine.deepspeed_logger)
engine.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
engine.deepspeed.init_distributed(
    "gloo", auto_mpi_discovery=False, verbose=False, dist_init_required=False
)
for stage in (0, 1, 2, 3):
    for dtype in ("fp32", "bf16"):
        print(json.dumps(measure(stage, dtype)), flush=True)
