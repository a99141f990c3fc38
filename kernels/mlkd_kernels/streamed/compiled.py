"""What torch.compile does with a loop over blocks."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def not_traced(function: Callable) -> Callable:
    """`function`, at which a compiled caller breaks its graph: a trace would unroll every block."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        # Not as a decorator from the start: that alone would import the whole compiler.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return call
