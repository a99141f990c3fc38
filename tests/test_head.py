"""Losses over a vocabulary: every head's logits, every kind against its definition through the
whole objective, and no matrix of all logits."""

import weakref
from typing import Any
from weakref import WeakSet

import pytest
import torch
import transformers
from test_objective import options
from test_trace import FAMILIES, config_of, inner, text
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from mlkd_dist.models.head import check_linear_head
from mlkd_dist.models.tap import capture
from mlkd_dist.objective import Objective, Widths
from mlkd_dist.processes.world import World
from mlkd_dist.student import Student
from mlkd_dist.tasks import Batch
from mlkd_dist.trace import Needs

pytestmark = pytest.mark.usefixtures("one_process")

WORLD = World(0, 1, 0, torch.device("cpu"))
HEAD, LOGITS = (Needs(frozenset({name})) for name in ("head", "logits"))
SCALED = {
    "Cohere": dict(vocab_size=64, hidden_size=32, num_attention_heads=4, logit_scale=0.25),
    "Granite": dict(vocab_size=64, hidden_size=32, num_attention_heads=4, logits_scaling=3.0),
    "HyperCLOVAX": dict(vocab_size=64, hidden_size=32, num_attention_heads=4, logits_scaling=3.0),
}
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "Electra", "Albert", "DistilBert", "ModernBert")


def language_model(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    if family in SCALED:
        config = getattr(transformers, f"{family}Config")(
            **SCALED[family], num_hidden_layers=2, intermediate_size=48, eos_token_id=2
        )
    else:
        config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model_class = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = model_class.from_config(config, attn_implementation=f"mlkd_tap_{inner(family)}")
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at zero, and other weights so small that all logits look alike.
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_the_rows_make_the_logits_of_the_model(family: str) -> None:
    model = language_model(family).eval()
    with torch.no_grad():
        logits = capture(model, model, text(), LOGITS, None).logits
        trace = capture(model, model, text(), HEAD, None)
        with trace.head.opened(trace.head_input.flatten(0, 1)) as rows:
            made = rows.logits().view_as(logits)
    assert trace.logits is None and logits.std() > 0.1
    assert torch.allclose(made, logits, atol=1e-4)
    # The model has its own head again.
    assert torch.equal(model(**text()).logits, logits)


def test_logits_that_are_changed_otherwise_are_refused() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            output = super().forward(input_ids, attention_mask)
            output.logits = output.logits + 1
            return output

    model = Shifted(config_of("Llama"))
    with pytest.raises(ValueError, match="Shifted changes its logits.*soft-capped at most"):
        capture(model, model, text(), HEAD, None)


def test_a_head_that_is_no_matrix_is_refused() -> None:
    model = language_model("Llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64))
    with pytest.raises(ValueError, match="'x': LlamaForCausalLM makes its logits by something"):
        check_linear_head(model, "x")


# A soft cap, tied embeddings and fewer entries on one side, a bias on the other.
def pair(vocabulary: int = 60) -> tuple[nn.Module, nn.Module]:
    student = language_model("Gemma2", 1, vocab_size=vocabulary, final_logit_softcapping=2.0)
    return student.double().eval(), language_model("Phi", 2).double().eval()


def batch(keep: tuple[bool, bool] = (True, True)) -> Batch:
    inputs = text()
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 60, inputs["input_ids"].shape, generator=draw)
    kept = torch.tensor(keep)
    counts = inputs["attention_mask"].bool() & kept.unsqueeze(1)
    # A prompt is read only.
    counts[:, :2] = False
    labels = labels.masked_fill(~counts, -100)
    inputs["input_ids"] = inputs["input_ids"] % 60
    return Batch(inputs, kept, labels, counts)


def objective_of(losses: dict[str, dict], backend: str = "streamed") -> Objective:
    widths = Widths(32, 3)
    given = options(losses, "causal_lm")
    return Objective(given, "uniform", widths, widths, backend, WORLD, vocabulary=True)


def loss_of(
    student: nn.Module, teacher: nn.Module, objective: Objective, given: Batch
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        seen = capture(teacher, teacher, given.inputs, objective.needs(1), None)
    rows = objective.global_rows([given])
    return Student(student, objective)(given, seen, rows, None, 0)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def definition(kind: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: (
            beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)
        ),
        "skew_forward_kl": lambda: kl(p, beta * p + (1 - beta) * q),
        "skew_reverse_kl": lambda: kl(q, beta * q + (1 - beta) * p),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return [g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


KINDS = {
    "forward_kl": ({}, 0.0),
    "reverse_kl": ({"squared_temperature": True}, 0.0),
    "jsd": ({"beta": 0.3}, 0.3),
    "skew_forward_kl": ({}, 0.1),
    "skew_reverse_kl": ({"beta": 0.25}, 0.25),
    "tvd": ({}, 0.0),
}


@pytest.mark.parametrize("backend", ["eager", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels_are_their_definition(kind: str, backend: str) -> None:
    """From the models' own logits: value and the gradient of every weight, prompts, padding and
    what only fills the batch left out, over the entries that both vocabularies have."""
    student, teacher = pair()
    own, beta = KINDS[kind]
    given = {"kind": kind, "temperature": 1.5, "truncate": True, "weight": 2.0, **own}
    for keep in ((True, True), (True, False)):
        counted = batch(keep)
        loss, shares = loss_of(
            student, teacher, objective_of({"soft_labels": given}, backend), counted
        )
        logits = [m(**counted.inputs).logits[..., :60] / 1.5 for m in (teacher, student)]
        p, q = (z[counted.label_keep].softmax(-1) for z in logits)
        expected = definition(kind, p.detach(), q, beta).mean()
        expected = expected * 1.5**2 if own.get("squared_temperature") else expected
        assert expected.item() > 1e-3
        torch.testing.assert_close(shares.squeeze(), expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, 2 * expected, rtol=1e-6, atol=0)
        ours, theirs = gradients(loss, student), gradients(2 * expected, student)
        for mine, true in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hard_labels_are_their_definition(smoothing: float) -> None:
    student, teacher = pair()
    counted = batch()
    objective = objective_of({"hard_labels": {"label_smoothing": smoothing}})
    loss, _ = loss_of(student, teacher, objective, counted)
    log_q = student(**counted.inputs).logits[counted.label_keep].log_softmax(-1)
    truth = counted.labels[counted.label_keep].unsqueeze(1)
    rows = (1 - smoothing) * -log_q.gather(1, truth).squeeze(1) - smoothing * log_q.mean(-1)
    torch.testing.assert_close(loss, rows.mean(), rtol=1e-6, atol=0)
    for mine, true in zip(gradients(loss, student), gradients(rows.mean(), student), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-9)


def test_the_terms_of_a_head_share_one_pass_through_it() -> None:
    student, teacher = pair(64)
    passes = []
    student.lm_head.register_forward_hook(lambda *_: passes.append(1))
    losses: dict[str, dict] = {"soft_labels": {}, "hard_labels": {}}
    both, shares = loss_of(student, teacher, objective_of(losses), batch())
    assert len(passes) == 1
    alone = [
        loss_of(student, teacher, objective_of({name: {}}), batch())[0].item() for name in losses
    ]
    assert shares.tolist() == pytest.approx(alone) and both.item() == pytest.approx(sum(alone))


def test_a_batch_without_a_row_is_zero_with_a_gradient() -> None:
    student, teacher = pair(64)
    losses: dict[str, dict] = {"soft_labels": {}, "hard_labels": {}}
    total, shares = loss_of(student, teacher, objective_of(losses), batch((False, False)))
    assert total.item() == 0 and shares.tolist() == [0, 0] and total.requires_grad


def test_unequal_vocabularies_are_refused_unless_asked_for() -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match="60 entries and the teacher's 64"):
        loss_of(student, teacher, objective_of({"soft_labels": {}}), batch())


class Memory(TorchDispatchMode):
    """Bytes of the tensors that live at once, those of a backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.live, self.peak = WeakSet(), 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, size: int) -> None:
        self.live -= size


def test_memory_grows_with_the_chunk_and_not_with_the_batch() -> None:
    """At the vocabulary of Llama 3: 128 tokens of logits are 63 MiB. Two chunks of them, since the
    first one is the cheapest, and then four."""
    vocabulary, width = 128256, 8
    small = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": 1}
    small |= {"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    student, teacher = (language_model("Llama", seed, **small, head_dim=4) for seed in (1, 2))
    objective = objective_of({"soft_labels": {"kind": "forward_kl"}})

    def peak_of(rows: int) -> float:
        ids = torch.arange(rows * 128).view(rows, 128)
        mask = torch.ones_like(ids)
        keep = torch.ones(rows, dtype=torch.bool)
        given = Batch({"input_ids": ids, "attention_mask": mask}, keep, ids, mask.bool())
        with Memory() as memory:
            loss_of(student, teacher, objective, given)[0].backward()
        return memory.peak / 2**20

    two, four = peak_of(2), peak_of(4)
    assert two > 63, "a chunk of logits is seen"
    # A matrix for each model would be 250 more.
    assert four < two + 10, (two, four)
