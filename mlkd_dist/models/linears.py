"""The linear maps of a layer, and what stands in their place where they are factorised."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mlkd_dist.models.roles import BY_HEAD, NAMES, ROLES


class LowRankLinear(nn.Module):
    """y = second(first(x)): a Linear, or Conv1D, of rank at most `rank`."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, conv1d: bool = False
    ):
        super().__init__()
        # Whether it stands for a Conv1D, whose weight lies the other way round.
        self.conv1d = conv1d
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        return self.second(self.first(x))

    @property
    def weight(self) -> nn.Parameter:
        """One factor. Models ask for a weight's type, or to initialise it where it was not loaded;
        either is the same for a factor."""
        return self.first.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias


class LowRankEmbedding(nn.Module):
    """second(first[token]): an Embedding of rank at most `rank`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.first = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx)
        self.second = nn.Linear(rank, embedding_dim, bias=False)

    @property
    def weight(self) -> nn.Parameter:
        """As that of LowRankLinear."""
        return self.first.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [...] -> [..., embedding_dim]
        return self.second(self.first(tokens))


MATRIX = (nn.Linear, Conv1D, LowRankLinear)


def matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its linear maps with their names; a factorised one is one map."""
    for name, child in module.named_children():
        if isinstance(child, MATRIX):
            yield name, child
        elif not isinstance(child, LowRankEmbedding):
            yield from ((f"{name}.{inner}", found) for inner, found in matrices(child))


def layer_matrices(layer: nn.Module) -> dict[str, nn.Module]:
    """Those of a layer that are known by name."""
    return {name: matrix for name, matrix in matrices(layer) if name in NAMES}


def part(name: str, role: str, output: Tensor, heads: int) -> Tensor:  # [B, L, W] -> [B, L, width]
    """Of what the matrix `name` gives, that which is its `role`."""
    roles = NAMES[name]
    if len(roles) == 1:
        return output
    index = roles.index(role)
    if name in BY_HEAD:
        return output.unflatten(-1, (heads, len(roles), -1))[..., index, :].flatten(-2)
    return output.chunk(len(roles), dim=-1)[index]


class Applied:
    """A matrix of a layer, applied to something else than in the model's own pass. A joined one is
    asked for each of its roles in turn, and computed once."""

    def __init__(self, name: str, matrix: nn.Module, heads: int):
        self.name, self.matrix, self.heads = name, matrix, heads
        self.given: Tensor | None = None
        self.made: Tensor | None = None

    def __call__(self, role: str, x: Tensor) -> Tensor:
        if self.given is not x:
            dtype = next(self.matrix.parameters()).dtype
            self.given, self.made = x, self.matrix(x.to(dtype))
        return part(self.name, role, self.made, self.heads)


def sizes(matrix: nn.Module) -> tuple[int, int]:
    """Inputs and outputs; under ZeRO-3 the weight itself may lie empty."""
    if isinstance(matrix, Conv1D):
        return matrix.nx, matrix.nf
    if isinstance(matrix, nn.Embedding | LowRankEmbedding):
        return matrix.num_embeddings, matrix.embedding_dim
    return matrix.in_features, matrix.out_features


def matrix_sizes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Role -> inputs and outputs, in the order of ROLES; of joined matrices, an equal part each."""
    found = {}
    for name, matrix in layer_matrices(layer).items():
        given, made = sizes(matrix)
        found |= {role: (given, made // len(NAMES[name])) for role in NAMES[name]}
    return {role: found[role] for role in ROLES if role in found}


def low_rank(matrix: nn.Module, rank: int) -> LowRankLinear | LowRankEmbedding:
    """What stands in the place of `matrix`; its weights are still to be set."""
    if isinstance(matrix, nn.Embedding):
        return LowRankEmbedding(*sizes(matrix), rank, matrix.padding_idx)
    has_bias = matrix.bias is not None
    return LowRankLinear(*sizes(matrix), rank, has_bias, isinstance(matrix, Conv1D))


@torch.no_grad()
def dense(matrix: LowRankLinear | LowRankEmbedding) -> nn.Module:
    """The ordinary module that computes the same."""
    first, second = matrix.first.weight, matrix.second.weight
    wide = torch.promote_types(first.dtype, torch.float32)
    options = {"device": first.device, "dtype": first.dtype}
    if isinstance(matrix, LowRankEmbedding):
        made = nn.Embedding(*sizes(matrix), padding_idx=matrix.padding_idx, **options)
        made.weight.copy_(first.to(wide) @ second.to(wide).T)
        return made
    weight = second.to(wide) @ first.to(wide)
    if matrix.conv1d:
        made = Conv1D(matrix.out_features, matrix.in_features).to(**options)
        weight = weight.T
    else:
        made = nn.Linear(*sizes(matrix), bias=matrix.bias is not None, **options)
    made.weight.copy_(weight)
    if matrix.bias is not None:
        made.bias.copy_(matrix.bias)
    return made
