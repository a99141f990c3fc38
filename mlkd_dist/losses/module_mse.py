"""Squared difference of what the matrices of a layer give: module by module."""

from typing import Literal

import torch
from torch import Tensor

from mlkd_dist.trace import Layer, Matrix

ROWS = "token"
SCOPE = "module"
READS = ("query", "key", "value", "output", "gate", "up", "down")
TEACHER = True
PROJECTION = False
PACKED = True


def module_mse(
    student: Layer,
    teacher: Layer,
    *,
    of: list[str] | None = None,
    input: Literal["own", "teacher"] = "own",
) -> Tensor:  # [B, L]
    """Sum over matrices M of the mean over M's width of (s_M - t_M)^2, s and t what M gives.

    M are those of the layer that `of` names, by default all it has: the projections to query, key
    and value, the attention's output projection, and the feed-forward maps (gate,) up and down. t_M
    is W x + b in the teacher at its own input x. With input="own" s_M is the student's M in its own
    forward pass, so that errors of the layers below count; with "teacher" the student's M applied
    to the teacher's x, each module by itself. 0 at padding. Raises ValueError where the widths of a
    matrix differ between the models. The matrix distillation of MaKD (Liu, Mao, Xu, Peng, Huang
    2026, arXiv 2604.03110). Our reading: mean, not sum, over the width; equal weights; before the
    activation function and before rotary embedding; "own".
    """
    # A model of fewer kinds of matrices than there are roles shows those it has.
    roles = [role for role in of or READS if role in teacher.matrices]
    assert roles and all(role in student.matrices for role in roles), (of, list(student.matrices))
    keep = student.mask.unsqueeze(-1)
    inputs: dict[int, Tensor] = {}
    rows = 0.0
    for role in roles:
        ours, theirs = student.matrices[role], teacher.matrices[role]
        made = ours.output if input == "own" else _from_teacher(ours, theirs, keep, inputs)
        if made.shape != theirs.output.shape:
            raise ValueError(
                f"module_mse of {role}: the student's is {tuple(made.shape)} and the teacher's "
                f"{tuple(theirs.output.shape)}; module_mse needs a student as wide as its teacher."
            )
        wide = torch.promote_types(made.dtype, torch.float32)
        gap = torch.where(keep, made.to(wide) - theirs.output.detach().to(wide), 0.0)
        rows = rows + gap.square().mean(-1)
    return rows


def _from_teacher(ours: Matrix, theirs: Matrix, keep: Tensor, inputs: dict[int, Tensor]) -> Tensor:
    """What the student's matrix makes of the teacher's input. Padding is dropped before it too: its
    weight's gradient is a product with what it was given. Matrices that read the same input get
    the same tensor, by which joined ones are computed once."""
    key = id(theirs.input)
    if key not in inputs:
        inputs[key] = torch.where(keep, theirs.input.detach(), 0.0)
    return ours.apply(inputs[key])
