"""The tap shows what transformers itself shows, for every family, and loses no gradient."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from mlkd_dist.models.tap import capture, check_readable
from mlkd_dist.trace import LAYER_READS, Needs, sample_vector

COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = COMMON | {"num_key_value_heads": 2}
FAMILIES = {
    "Bert": COMMON,
    "Roberta": COMMON,
    "XLMRoberta": COMMON,
    "Electra": COMMON | {"embedding_size": 16},
    "Albert": COMMON | {"embedding_size": 16},
    "DistilBert": dict(vocab_size=64, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
    "ModernBert": COMMON | {"cls_token_id": 1, "sep_token_id": 2},
    "GPT2": dict(vocab_size=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
    "OPT": dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=32,
    ),
    "GPTNeoX": COMMON,
    "Llama": GROUPED,
    "Mistral": GROUPED,
    # Heads wider than hidden / heads: what attention shows is 64 wide, the states 32.
    "Qwen3": GROUPED | {"head_dim": 16},
    "Phi": COMMON,
    "Gemma2": GROUPED | {"head_dim": 16},
}


def config_of(family: str) -> transformers.PreTrainedConfig:
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return config


def model_of(family: str, attention: str, model_class: type = AutoModel) -> nn.Module:
    torch.manual_seed(0)
    return model_class.from_config(config_of(family), attn_implementation=attention)


def inner(family: str) -> str:
    """Gemma-2 caps its scores, which only its own eager attention does."""
    return "eager" if family == "Gemma2" else "sdpa"


def text(rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(3, 60, (rows, length)), "attention_mask": mask}


EVERYTHING = Needs(
    frozenset({"embedding", "cls", "mean", "last"}),
    {layer: frozenset(LAYER_READS) for layer in range(3)},
)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_transformers(family: str) -> None:
    tapped = model_of(family, f"mlkd_tap_{inner(family)}").eval()
    plain = model_of(family, "eager").eval()
    inputs = text()
    trace = capture(tapped, tapped, inputs, EVERYTHING, None)
    truth = plain(**inputs, output_hidden_states=True)
    keep = inputs["attention_mask"].bool()

    def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        return (ours - theirs)[keep].abs().max().item()

    assert gap(trace.embedding, truth.hidden_states[0]) == 0
    # transformers puts the final norm on the last of these.
    for layer in (0, 1):
        assert gap(trace.layers[layer].hidden, truth.hidden_states[layer + 1]) < 1e-5
    last = truth.last_hidden_state
    assert torch.allclose(trace.vectors["cls"], last[:, 0], atol=1e-5)
    assert torch.allclose(trace.vectors["last"][1], last[1, 4], atol=1e-5)
    assert torch.allclose(trace.vectors["mean"][1], last[1, :5].mean(0), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_made_of_what_is_shown(family: str) -> None:
    """The context recomputed from query, key and value; its projection, from the context."""
    model = model_of(family, f"mlkd_tap_{inner(family)}").eval()
    attentions = []
    projections = [m for m in model.modules() if isinstance(m, nn.Linear | transformers.Conv1D)]
    for module in projections:
        module.register_forward_hook(lambda m, args, out: attentions.append((args[0], out)))
    # Without padding, so that only causality masks.
    inputs = text()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    trace = capture(model, model, inputs, EVERYTHING, None)
    layer = trace.layers[0]
    heads = model.config.num_attention_heads
    width = layer.query.shape[-1] // heads

    def split(x: torch.Tensor) -> torch.Tensor:  # [B, L, H*d] -> [B, heads, L, d]
        x = x.unflatten(-1, (-1, width)).transpose(1, 2)
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    scale = getattr(model.config, "query_pre_attn_scalar", width) ** -0.5
    scores = split(layer.query) @ split(layer.key).mT * scale
    if family == "Gemma2":
        cap = model.config.attn_logit_softcapping
        scores = torch.tanh(scores / cap) * cap
    if family not in (
        "Bert",
        "Roberta",
        "XLMRoberta",
        "Electra",
        "Albert",
        "DistilBert",
        "ModernBert",
    ):
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    context = (scores.softmax(-1) @ split(layer.value)).transpose(1, 2).flatten(2)
    assert torch.allclose(context, layer.context, atol=1e-5)
    # Some module took this context and gave this output.
    assert any(
        given.shape[-1] == context.shape[-1]
        and torch.allclose(given.reshape(context.shape), layer.context, atol=1e-6)
        and torch.equal(made.reshape(layer.attention_output.shape), layer.attention_output)
        for given, made in attentions
        if given.numel() == context.numel()
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Gemma2"])
def test_a_layer_knows_how_its_attention_map_is_made(family: str) -> None:
    """softmax(scale <query, key>) is what transformers itself says, by head, where tokens are
    padded too. Gemma-2 caps its scores: suited.py refuses it."""
    tapped = model_of(family, "mlkd_tap_sdpa").eval()
    plain, inputs = model_of(family, "eager").eval(), text()
    trace = capture(tapped, tapped, inputs, EVERYTHING, None)
    truth = plain(**inputs, output_attentions=True).attentions
    mask = inputs["attention_mask"].bool()
    for index in range(3):
        layer = trace.layers[index]
        query, key = layer.by_head("query"), layer.by_head("key")
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if layer.scale is None else layer.scale
        seen = mask[:, None, None].expand(-1, 1, 7, -1)
        seen = seen.tril() if layer.causal else seen
        found = (query @ key.mT * scale).masked_fill(~seen, float("-inf")).softmax(-1)
        rows = mask[:, None].expand(-1, found.shape[1], -1)
        assert torch.allclose(found[rows], truth[index][rows], atol=1e-5)


def test_a_layer_shows_one_vector_per_sample() -> None:
    model, inputs = model_of("Bert", "mlkd_tap_sdpa").eval(), text()
    layer = capture(model, model, inputs, EVERYTHING, None).layers[1]
    assert torch.equal(layer.cls, layer.hidden[:, 0])
    assert torch.equal(layer.last, layer.hidden[[0, 1], [6, 4]])
    assert torch.allclose(layer.mean[1], layer.hidden[1, :5].mean(0), atol=1e-6)


@pytest.mark.parametrize("family", ["Bert", "ModernBert", "Llama", "GPT2"])
@pytest.mark.parametrize("read", ["context", "query", "hidden", "attention_output"])
def test_activation_checkpointing_keeps_gradients(family: str, read: str) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = model_of(family, "mlkd_tap_sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        needs = Needs(layers={1: frozenset({read})})
        trace = capture(model, model, text(), needs, None)
        getattr(trace.layers[1], read).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) > 5 and len(plain) == len(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_know_whether_they_look_back_only(family: str) -> None:
    model = model_of(family, f"mlkd_tap_{inner(family)}").eval()
    layer = capture(model, model, text(), EVERYTHING, None).layers[1]
    # What stands later changes what is seen of an earlier token, or does not.
    later = text()
    later["input_ids"][0, -1] = 60
    other = capture(model, model, later, EVERYTHING, None).layers[1]
    assert layer.causal == torch.allclose(layer.context[0, :-1], other.context[0, :-1], atol=1e-6)


def test_queries_are_what_their_matrix_makes() -> None:
    """Also where they are scaled before attention."""
    model = model_of("OPT", "mlkd_tap_sdpa").eval()
    made = []
    matrix = model.decoder.layers[1].self_attn.q_proj
    matrix.register_forward_hook(lambda _, args, output: made.append(output))
    layer = capture(model, model, text(), EVERYTHING, None).layers[1]
    torch.testing.assert_close(layer.query, made[0])
    assert layer.scale == pytest.approx(8**-0.5)


def test_only_what_is_needed_is_kept() -> None:
    model = model_of("Bert", "mlkd_tap_sdpa").eval()
    needs = Needs(frozenset({"mean"}), {2: frozenset({"key"})})
    trace = capture(model, model, text(), needs, None)
    assert list(trace.layers) == [2] and trace.layers[2].key is not None
    kept = {
        name for name, value in vars(trace.layers[2]).items() if isinstance(value, torch.Tensor)
    }
    assert kept == {"mask", "key"}
    assert trace.embedding is None and trace.logits is None and list(trace.vectors) == ["mean"]


def test_hooks_do_not_outlive_the_pass() -> None:
    model = model_of("Bert", "mlkd_tap_sdpa").eval()

    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = count()
    capture(model, model, text(), EVERYTHING, None)
    assert count() == before


def test_two_models_of_one_config_do_not_share_the_tap() -> None:
    config = config_of("Bert")
    tapped = AutoModel.from_config(copy.deepcopy(config), attn_implementation="mlkd_tap_sdpa")
    plain = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
    assert tapped.config._attn_implementation == "mlkd_tap_sdpa"
    assert plain.config._attn_implementation == "eager"


def test_logits_and_labels() -> None:
    model = model_of("Bert", "mlkd_tap_sdpa", AutoModelForSequenceClassification).eval()
    labels = torch.tensor([1, 0])
    trace = capture(model, model, text(), Needs(frozenset({"logits"})), labels)
    assert torch.equal(trace.logits, model(**text()).logits) and trace.labels is labels


@pytest.mark.parametrize("family", ["MPNet", "DebertaV2"])
def test_models_without_the_interface_are_refused_by_name(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**COMMON)
    with pytest.raises(ValueError, match=f"'x': {family}Model does not use.*attention interface"):
        check_readable(AutoModel.from_config(config), "x")


def test_sample_vectors_with_left_padding() -> None:
    states = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    assert torch.equal(sample_vector(states, mask, "cls"), states[[0, 1], [2, 0]])
    assert torch.equal(sample_vector(states, mask, "last"), states[[0, 1], [3, 2]])
    assert torch.equal(
        sample_vector(states, mask, "mean"),
        torch.stack([states[0, 2:].mean(0), states[1, :3].mean(0)]),
    )


def test_depth_of_needs() -> None:
    assert Needs(layers={1: frozenset({"hidden"}), 0: frozenset({"key"})}).depth() == 2
    assert Needs(frozenset({"embedding"})).depth() == 1
    assert Needs(frozenset({"logits"}), {0: frozenset({"key"})}).depth() is None
