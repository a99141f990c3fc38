"""Which implementation of an operation runs."""

import torch
from torch import Tensor

AVAILABLE = "available"


def backends() -> dict[str, str]:
    """Backend -> "available", or why it is not."""
    return {
        "eager": AVAILABLE,
        "streamed": AVAILABLE,
        "triton": "not written yet in this version of mlkd_kernels",
    }


def choose(backend: str, like: Tensor | None = None) -> str:
    """The backend that runs for `backend`; `auto` takes the fastest for a tensor like `like`.

    Without `like` the device is the one that this machine computes on.
    """
    states = backends()
    usable = [name for name in ("triton", "streamed", "eager") if states[name] == AVAILABLE]
    if backend == "auto":
        on_cuda = torch.cuda.is_available() if like is None else like.is_cuda
        return usable[0] if on_cuda or usable[0] != "triton" else usable[1]
    if backend in usable:
        return backend
    why = "; ".join(f"{name}: {state}" for name, state in states.items() if state != AVAILABLE)
    raise ValueError(
        f"backend={backend!r} cannot run here; use one of: auto, {', '.join(usable)}. Not "
        f"available: {why}."
    )
