"""Which implementation of an operation runs."""

import importlib.util
import os

import torch
from torch import Tensor

AVAILABLE = "available"
# What the Triton kernels that make scores take: a row block and its gradient lie in registers. The
# widest attention heads have 256; wider relations have their scores from a matrix product.
WIDEST_HEAD = 256
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def backends() -> dict[str, str]:
    """Backend -> "available", or why it is not."""
    return {"eager": AVAILABLE, "streamed": AVAILABLE, "triton": _triton_state()}


def choose(backend: str, like: Tensor | None = None, *, triton_lacks: str | None = None) -> str:
    """The backend that runs for `backend`; `auto` takes the fastest for a tensor like `like`.

    Without `like` the device is the one that this machine computes on. `triton_lacks` says why
    there is no Triton kernel for this call. Raises ValueError where the backend cannot run.
    """
    states = backends()
    if states["triton"] == AVAILABLE:
        states["triton"] = _device_state(like) if triton_lacks is None else triton_lacks
    usable = [name for name in ("triton", "streamed", "eager") if states[name] == AVAILABLE]
    if backend == "auto":
        # The interpreter is for tests: it runs where it is asked for by name.
        return next(name for name in usable if name != "triton" or _on_gpu(like))
    if backend in usable:
        return backend
    why = "; ".join(f"{name}: {state}" for name, state in states.items() if state != AVAILABLE)
    raise ValueError(
        f"backend={backend!r} cannot run here; use one of: auto, {', '.join(usable)}. Not "
        f"available: {why}."
    )


def head_lacks(student_width: int, teacher_width: int, *dtypes: torch.dtype) -> str | None:
    """Why the Triton kernels that make scores do not take heads of these widths and types; None
    where they do."""
    if max(student_width, teacher_width) > WIDEST_HEAD:
        return f"its heads have a width of {WIDEST_HEAD} at most"
    return type_lacks(*dtypes)


def type_lacks(*dtypes: torch.dtype) -> str | None:
    """Why the Triton kernels do not take these types; None where they do."""
    if any(dtype not in TRITON_DTYPES for dtype in dtypes):
        return "it takes fp32, fp16 and bf16"
    return None


def _triton_state() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (torch.cuda.is_available() or _interpreting()):
        return "there is no GPU here"
    return AVAILABLE


def _device_state(like: Tensor | None) -> str:
    return AVAILABLE if _on_gpu(like) or _interpreting() else "the tensors are not on a GPU"


def _on_gpu(like: Tensor | None) -> bool:
    return torch.cuda.is_available() if like is None else like.is_cuda


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
