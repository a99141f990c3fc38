"""Divergences between a teacher and a student: one definition each, `eager`, and its fast twins.

Gradients go to the student's side only; rows are fp32, float64 where the inputs are.
"""

from mlkd_kernels._backend import backends, choose
from mlkd_kernels.attention_map import attention_kl, attention_mse
from mlkd_kernels.contrastive import info_nce
from mlkd_kernels.linear_divergence import linear_divergence
from mlkd_kernels.relation import relation_kl
from mlkd_kernels.similarity import similarity_kl, similarity_mse
from mlkd_kernels.top_k import top_k_divergence

__all__ = [
    "attention_kl",
    "attention_mse",
    "backends",
    "choose",
    "info_nce",
    "linear_divergence",
    "relation_kl",
    "similarity_kl",
    "similarity_mse",
    "top_k_divergence",
]
