"""How much memory a process holds."""

import gc
from pathlib import Path

import torch


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


def own_bytes() -> int:
    """Of this process, without pages of files, which the system takes back when it needs them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(kilobytes) * 1024
