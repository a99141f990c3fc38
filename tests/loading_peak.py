"""Loads the teacher in the folder named on the command line at ZeRO 3, in the processes that the
environment describes, onto the disk where a folder for that is named too; prints by how many bytes
the memory that is this process's own grew at most and in the end, and what the teacher says.
"""

import json
import sys
import threading
import time

import torch
from held import own_bytes
from transformers import AutoModelForCausalLM

from mlkd_dist import engine
from mlkd_dist.config import TeacherConfig
from mlkd_dist.teacher import Teacher
from mlkd_dist.trace import Needs


def watch() -> None:
    while not loaded.is_set():
        peak[0] = max(peak[0], own_bytes())
        time.sleep(0.002)


# What is freed is to be seen as free; see also MALLOC_MMAP_THRESHOLD_ in test_teacher_loading.py.
if not sys.argv[3:]:
    engine.keep_freed_memory = lambda: None
world = engine.start()
settings = TeacherConfig(dtype="fp32", zero_stage=3)
if sys.argv[3:]:
    settings.offload, settings.offload_dir = "nvme", sys.argv[3]
needs = Needs(model=frozenset({"head"}))
# What is imported and built on the way to a first model.
Teacher(sys.argv[1], settings, AutoModelForCausalLM, needs, world).close()
before = own_bytes()
peak, loaded = [before], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
teacher = Teacher(sys.argv[2], settings, AutoModelForCausalLM, needs, world)
loaded.set()
watcher.join()
grew = {"most": peak[0] - before, "rests": own_bytes() - before}
tokens = torch.arange(64)[None]
with torch.no_grad():
    says = [float(teacher.run(input_ids=tokens).logits.double().sum()) for _ in range(3)]
print(json.dumps(grew | {"says": says}), flush=True)
teacher.close()
engine.stop()
