"""Multi-level knowledge distillation of large transformers, sharded with DeepSpeed."""

__version__ = "0.1.0"
