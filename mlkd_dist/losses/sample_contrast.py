"""Contrast among the samples of the global batch, student beside teacher."""

from typing import Literal

from torch import Tensor

from mlkd_dist.trace import Samples
from mlkd_kernels import info_nce

ROWS = "sample"
SCOPE = "batch"
READS = ("cls", "mean", "last")
TEACHER = True
PROJECTION = True


def sample_contrast(
    student: Samples,
    teacher: Samples,
    *,
    of: str = "cls",
    temperature: float = 0.1,
    positives: Literal["auto", "label", "sample"] = "auto",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:  # [N]
    """Supervised contrastive loss over N student and N teacher vectors, one row per sample.

    For an anchor i of the 2N, with z normalised unless `normalize=False` and T the temperature:
        -1/|P(i)| sum_{p in P(i)} log(exp(z_i.z_p / T) / sum_{a != i} exp(z_i.z_a / T))
    Row n is the mean of sample n's two anchors; no T^2 inside; 0 where a sample does not count.
    P(i) holds the vectors of i's class (positives="label") or only the same sample's vector of the
    other model ("sample"); "auto" takes the classes where the task has them. Raises ValueError for
    "label" without classes, and where the vectors' widths differ. L_SC of MLKD-BERT (Zhang, Yang,
    Ji 2024, arXiv 2407.02775). Our reading: the two views are student and detached teacher, T is
    0.1, 1/|P(i)| is outside the logarithm (Khosla et al. 2020, arXiv 2004.11362), "sample" where
    there are no classes. The caller has taken the vector that `of` names and projected the
    student's.
    """
    assert of in READS and positives in ("auto", "label", "sample"), (of, positives)
    if positives == "label" and student.labels is None:
        raise ValueError(
            "sample_contrast: positives='label' but these samples have no class labels; use "
            "positives='sample' or 'auto'."
        )
    return info_nce(
        student.vector,
        teacher.vector,
        labels=None if positives == "sample" else student.labels,
        temperature=temperature,
        mask=student.keep,
        normalize=normalize,
        backend=backend,
    )
