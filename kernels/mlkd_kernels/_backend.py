"""Which implementation of an operation runs."""

AVAILABLE = "available"


def backends() -> dict[str, str]:
    """Backend -> "available", or why it is not."""
    return {
        "eager": AVAILABLE,
        "streamed": "not written yet in this version of mlkd_kernels",
        "triton": "not written yet in this version of mlkd_kernels",
    }


def choose(backend: str) -> str:
    """The backend that runs for `backend`; `auto` takes the fastest that is available."""
    states = backends()
    usable = [name for name in ("triton", "streamed", "eager") if states[name] == AVAILABLE]
    if backend == "auto":
        return usable[0]
    if backend in usable:
        return backend
    why = "; ".join(f"{name}: {state}" for name, state in states.items() if state != AVAILABLE)
    raise ValueError(
        f"backend={backend!r} cannot run here; use one of: auto, {', '.join(usable)}. Not "
        f"available: {why}."
    )
