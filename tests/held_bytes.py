"""What DeepSpeed's engines hold and send on the first of N processes, N being torch's fake process
group: `held_bytes.py N`. One line of JSON per ZeRO stage, type and number of micro-batches of a
student, and one per type and group of a teacher."""

import json
import os
import sys
import warnings

import torch
import torch.distributed as dist
from held import held
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import get_scheduler
from wire import counted, total

from mlkd_dist import config as configs
from mlkd_dist import engine

WORLD = int(sys.argv[1])
# With LOCAL_SIZE of the world DeepSpeed waits for peers that do not exist.
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(WORLD), LOCAL_SIZE="1")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
warnings.simplefilter("ignore")
BUCKET = 300_000


def matrices(dtype: str) -> nn.Sequential:
    made = [nn.Linear(512, 512, bias=False) for _ in range(8)]
    return nn.Sequential(*made).to(engine.DTYPES[dtype])


def trained(zero_stage: int, dtype: str, accum: int) -> dict[str, object]:
    config = configs.Config()
    config.student.zero_stage, config.student.dtype = zero_stage, dtype
    config.batch.grad_accum = accum
    config.deepspeed = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    if zero_stage == 3:
        config.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    x = torch.randn(4, 512, dtype=engine.DTYPES[dtype])
    before = held()
    module = matrices(dtype)
    made = engine.student_engine(module, config, lambda o: get_scheduler("constant", o), 1e-3)
    for last in (False, True):
        with counted() as sent:
            with_gradients = 0
            for _ in range(accum):
                engine.backward(made, made(x).float().square().sum())
                with_gradients = max(with_gradients, held() - before if last else 0)
                made.step()
    found = {"zero_stage": zero_stage, "dtype": dtype, "accum": accum}
    found |= {"with_gradients": with_gradients, "rests": held() - before}
    found |= {"sent": total(sent), "kinds": sorted({each.kind for each in sent if each.size > 1e4})}
    made.destroy()
    return found


def frozen(dtype: str, shards: int) -> dict[str, object]:
    """A teacher at ZeRO 3 over the first processes."""
    config = engine.frozen_config(dtype, 3, "none")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    x = torch.randn(4, 512, dtype=engine.DTYPES[dtype])
    before = held()
    with engine.inside(dist.new_group(range(shards)), config):
        module = matrices(dtype).requires_grad_(False)
    made = engine.frozen_engine(module, config)
    # In the first two passes DeepSpeed compares the order of the layers.
    for _ in range(3):
        with torch.no_grad(), counted() as sent:
            made(x)
    found = {"shards": shards, "dtype": dtype, "rests": held() - before, "sent": total(sent)}
    found["ranks"] = max(len(each.ranks) for each in sent)
    made.destroy()
    return found


dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
engine.set_log_level_from_string("error", engine.deepspeed_logger)
engine.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
engine.deepspeed.init_distributed(
    "gloo", auto_mpi_discovery=False, verbose=False, dist_init_required=False
)
about = {"parameters": 8 * 512 * 512, "bucket": BUCKET}
for stage in (0, 1, 2, 3):
    for dtype, accum in (("fp32", 1), ("bf16", 1), ("bf16", 2)):
        print(json.dumps(about | trained(stage, dtype, accum)), flush=True)
for dtype, shards in (("fp32", WORLD), ("bf16", WORLD), ("bf16", min(8, WORLD))):
    print(json.dumps(about | frozen(dtype, shards)), flush=True)
