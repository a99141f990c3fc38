"""What an engine trains, as the tensors of files: one file per process, each tensor under its kind,
its place in the flattened parameter and the parameter's name. What one layout wrote, any other
reads; nothing in these files is code.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlkd_dist.engine import Engine
from mlkd_dist.processes.world import World
from mlkd_dist.saving.fragments import MOMENTS, Fragment, fragments, make_state, refresh, to_write


def own_shard(engine: Engine, world: World, copied: bool) -> Callable[[Path], None]:
    """What writes the part of this process; `copied` to host memory, so that it may do so while the
    engine trains on."""
    tensors = dict(own_tensors(engine, world))
    if copied:
        tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
    told = {"rng": json.dumps(host_rng())}
    return lambda path: save_file(tensors, path, told)


def read_shards(engine: Engine, world: World, folder: Path, files: list[str], own: bool) -> None:
    """Into a new engine of any layout; `own` where it is that of the engine that wrote, and so this
    process finds all it needs in its own file. All processes call this."""
    first = files[world.rank] if own else files[0]
    parts = Parts(folder, [first, *(name for name in files if name != first)])
    for fragment in fragments(engine):
        restore(fragment, parts)
    refresh(engine)
    for name, buffer in buffers(engine):
        buffer.copy_(parts.whole("buffer", name))
    if own:
        parts.restore_rng()


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Of all that trains, whole."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def own_tensors(engine: Engine, world: World) -> Iterator[tuple[str, Tensor]]:
    for name, start, parts in to_write(engine, world):
        for kind, tensor in parts.items():
            # A step is one number that all parameters of a group share.
            yield f"{kind}:{start}:{name}", tensor.clone() if kind == "step" else tensor
    if world.first:
        for name, buffer in buffers(engine):
            yield f"buffer:0:{name}", buffer.contiguous()
    yield "rng:0:cpu", torch.get_rng_state()
    if world.device.type == "cuda":
        yield "rng:0:cuda", torch.cuda.get_rng_state(world.device)


def buffers(engine: Engine) -> list[tuple[str, Tensor]]:
    """Those that belong to the weights, such as running means."""
    saved = engine.module.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in engine.module.named_buffers() if name in saved]


def restore(fragment: Fragment, parts: "Parts") -> None:
    size = fragment.weight.numel()
    fragment.weight.copy_(parts.read("weight", fragment.name, fragment.start, size))
    moments = [parts.read(kind, fragment.name, fragment.start, size) for kind in MOMENTS]
    # A parameter that never had a gradient may have none.
    if all(moment is not None for moment in moments):
        make_state(fragment)
        for kind, values in zip(MOMENTS, moments, strict=True):
            fragment.view(kind).copy_(values)
        fragment.state["step"].fill_(parts.step(fragment.name))


class Parts:
    """The tensors of several files by key. A file is opened when those before it do not suffice."""

    def __init__(self, folder: Path, files: list[str]):
        self.folder, self.waiting, self.opened = folder, list(files), []
        self.places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self.open_next()

    def open_next(self) -> None:
        file = safe_open(self.folder / self.waiting.pop(0), framework="pt")
        self.opened.append(file)
        for key in file.keys():
            kind, start, name = key.split(":", 2)
            size = file.get_slice(key).get_shape()[0] if kind != "buffer" else 0
            self.places.setdefault((kind, name), []).append((int(start), size, file, key))

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor | None:
        """Elements of a flattened parameter, of however many files; None where none has any."""
        while True:
            found = list(self.overlaps(kind, name, start, size))
            if sum(last - first for first, last, *_ in found) == size or not self.waiting:
                break
            self.open_next()
        if not found:
            return None
        assert sum(last - first for first, last, *_ in found) == size, (kind, name)
        out = torch.empty(size)
        for first, last, place, file, key in found:
            piece = file.get_slice(key)[first - place : last - place]
            out[first - start : last - start] = piece
        return out

    def overlaps(self, kind: str, name: str, start: int, size: int) -> Iterator[tuple]:
        for place, length, file, key in self.places.get((kind, name), []):
            first, last = max(start, place), min(start + size, place + length)
            if first < last:
                yield first, last, place, file, key

    def step(self, name: str) -> float:
        _, _, file, key = self.places["step", name][0]
        return float(file.get_tensor(key))

    def whole(self, kind: str, name: str) -> Tensor:
        while (kind, name) not in self.places:
            self.open_next()
        _, _, file, key = self.places[kind, name][0]
        return file.get_tensor(key)

    def restore_rng(self) -> None:
        """As it was in this process; its file is the first."""
        own = self.opened[0]
        states = json.loads(own.metadata()["rng"])
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        version, state, spare = states["python"]
        random.setstate((version, tuple(state), spare))
        torch.set_rng_state(own.get_tensor("rng:0:cpu"))
        if "rng:0:cuda" in own.keys():
            torch.cuda.set_rng_state(own.get_tensor("rng:0:cuda"))


def host_rng() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    version, state, spare = random.getstate()
    return {"numpy": [kind, keys.tolist(), *rest], "python": [version, list(state), spare]}
