"""Multi-level knowledge distillation of large transformers, sharded with DeepSpeed."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_student"]


def load_student(path: Any, model_class: Any = None, dtype: Any = "auto") -> Any:
    """The student of a run, from the folder that it exported: a model of transformers in eval mode,
    also where it is stored in factors (student.low_rank), which transformers itself cannot read.

    `model_class` is an Auto class or a model class; by default the one that its config.json names.
    Raises ValueError where the folder lacks weights of that class.
    """
    # Heavy, and not needed by those who only read a config.
    from mlkd_dist.low_rank import load_student

    return load_student(path, model_class, dtype)
