"""The matrices of a layer, known by name: each is shown to be what its role says, by what the
family's own code makes of it."""

import pytest
import torch
from test_trace import FAMILIES, config_of, model_of, text
from torch import Tensor, nn
from transformers import AutoModel
from transformers.activations import ACT2FN

from mlkd_dist.config import LowRankConfig
from mlkd_dist.low_rank import factorise, plan
from mlkd_dist.models.linears import LowRankLinear, matrix_sizes
from mlkd_dist.models.roles import ROLES
from mlkd_dist.models.tap import capture, layer_modules
from mlkd_dist.trace import LAYER_READS, Layer, Needs, Trace

GATED = ("ModernBert", "Llama", "Mistral", "Qwen3", "Gemma2")
# Those that turn queries and keys by their position, which keeps lengths.
ROTARY = ("ModernBert", "GPTNeoX", "Llama", "Mistral", "Phi", "Gemma2")
FIELDS = ("input", "output", "apply")


def needs(*fields: str, layers: int = 3) -> Needs:
    every = frozenset((role, field) for role in ROLES for field in fields)
    return Needs(
        layers={i: frozenset(LAYER_READS) for i in range(layers)},
        matrices=dict.fromkeys(range(layers), every),
    )


def seen(family: str, factorised: bool = False) -> tuple[nn.Module, Trace]:
    inner = "eager" if family == "Gemma2" else "sdpa"
    model = model_of(family, f"mlkd_tap_{inner}").eval()
    with torch.no_grad():
        # As they are made, weights are so small that all they give is nearly 0.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    if factorised:
        factorise(model, plan(model, LowRankConfig(0.7)))
    with torch.no_grad():
        return model, capture(model, model, text(), needs(*FIELDS), None)


def lengths(vectors: Tensor, width: int) -> Tensor:
    return vectors.unflatten(-1, (-1, width)).norm(dim=-1)


@pytest.mark.parametrize("factorised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_role_is_what_the_family_makes_of_it(family: str, factorised: bool) -> None:
    model, trace = seen(family, factorised)
    if factorised:
        assert any(isinstance(m, LowRankLinear) for m in layer_modules(model)[0].modules())
    heads = model.config.num_attention_heads
    activation = ACT2FN[
        next(
            getattr(model.config, name)
            for name in ("hidden_activation", "hidden_act", "activation", "activation_function")
            if isinstance(getattr(model.config, name, None), str)
        )
    ]
    for index in range(3):
        layer = trace.layer(index)
        found = layer.matrices
        assert set(found) == set(ROLES) - (set() if family in GATED else {"gate"})
        attention(family, layer, layer.query.shape[-1] // heads)
        inside = found["gate" if family in GATED else "up"].output
        inside = activation(inside) * (found["up"].output if family in GATED else 1)
        assert inside.abs().max() > 0.01
        assert torch.allclose(found["down"].input, inside, atol=1e-5)
        for role, matrix in found.items():
            assert torch.allclose(matrix.apply(matrix.input), matrix.output, atol=1e-6), role
            sizes = (matrix.input.shape[-1], matrix.output.shape[-1])
            assert matrix_sizes(layer_modules(model)[0])[role] == sizes
            assert not torch.allclose(matrix.apply(2 * matrix.input), matrix.output, atol=1e-3)


def attention(family: str, layer: Layer, width: int) -> None:
    """What enters attention is what its matrices give, turned or normalised by some."""
    found = layer.matrices
    assert torch.allclose(found["value"].output, layer.value, atol=1e-6)
    assert torch.allclose(found["output"].input, layer.context, atol=1e-6)
    assert torch.allclose(found["output"].output, layer.attention_output, atol=1e-6)
    for role in ("query", "key"):
        given, used = found[role].output, getattr(layer, role)
        if family in ROTARY:
            given, used = lengths(given, width), lengths(used, width)
        # Qwen-3 normalises both after the projection.
        if family != "Qwen3":
            assert torch.allclose(given, used, atol=1e-4), role
    if found["query"].output.shape == found["key"].output.shape:
        assert not torch.allclose(found["query"].output, found["key"].output, atol=1e-3)


def test_only_what_is_asked_for_is_kept() -> None:
    model = model_of("Llama", "mlkd_tap_sdpa").eval()
    some = Needs(matrices={1: frozenset({("gate", "output"), ("query", "input")})})
    assert some.depth() == 2
    trace = capture(model, model, text(), some, None)
    assert list(trace.layers) == [1] and set(trace.layers[1].matrices) == {"gate", "query"}
    gate, query = (trace.layers[1].matrices[role] for role in ("gate", "query"))
    assert gate.input is None and gate.apply is None and gate.output.shape[-1] == 48
    assert query.output is None and query.input.shape[-1] == 32


def test_a_joined_matrix_is_applied_once_for_all_its_parts() -> None:
    model = model_of("GPT2", "mlkd_tap_sdpa").eval()
    trace = capture(model, model, text(), needs("apply"), None)
    joined = layer_modules(model)[0].attn.c_attn
    calls = []
    joined.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 7, 32)
    parts = [trace.layer(0).matrices[role].apply(x) for role in ("query", "key", "value")]
    assert calls == [1]
    assert torch.allclose(torch.cat(parts, -1), x @ joined.weight + joined.bias, atol=1e-6)


@pytest.mark.parametrize("family", ["Bert", "ModernBert", "GPT2", "Llama"])
@pytest.mark.parametrize("field", ["output", "apply"])
def test_activation_checkpointing_keeps_gradients(family: str, field: str) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = model_of(family, "mlkd_tap_sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        asked = Needs(matrices={1: frozenset((role, field) for role in ("key", "down"))})
        found = capture(model, model, text(), asked, None).layers[1].matrices
        torch.manual_seed(5)
        given = {role: torch.randn(2, 7, 128 if family == "GPT2" else 48) for role in ("down",)}
        given["key"] = torch.randn(2, 7, 32)
        for role, matrix in found.items():
            made = matrix.output if field == "output" else matrix.apply(given[role])
            made.square().sum().backward(retain_graph=True)
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) >= 2 and len(plain) == len(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_every_layer_of_the_families_is_known() -> None:
    for family in FAMILIES:
        with torch.device("meta"):
            model = AutoModel.from_config(config_of(family))
        for layer in layer_modules(model):
            assert len(matrix_sizes(layer)) == (7 if family in GATED else 6), family
