"""Factorised students: the best approximation within a budget, saved, loaded and merged back, for
every family."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from conftest import write_model
from test_trace import COMMON, FAMILIES, config_of, text
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import mlkd_dist
from mlkd_dist.config import FromTeacherConfig, LowRankConfig, StudentConfig, UserError
from mlkd_dist.low_rank import (
    check_plan,
    energy_ranks,
    equal_ranks,
    factorise,
    factors,
    merge,
    plan,
    ranks_of,
)
from mlkd_dist.models.linears import LowRankEmbedding, LowRankLinear
from mlkd_dist.models.model import load_model
from mlkd_dist.student import make_student


def randn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_factors_are_the_best_of_their_rank_and_balanced(shape: tuple[int, int]) -> None:
    """No matrix of rank r is nearer than the singular values that are left out (Eckart, Young)."""
    weight = randn(*shape)
    squares = torch.linalg.eigvalsh(weight @ weight.T).flip(0)
    for rank in (1, 3, 5):
        left, right = factors(weight, rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        gap = (weight - left @ right).square().sum()
        assert gap.item() == pytest.approx(squares[rank:].sum().item(), abs=1e-12)
        values = torch.diag(squares[:rank].sqrt())
        torch.testing.assert_close(left.T @ left, values, rtol=0, atol=1e-12)
        torch.testing.assert_close(right @ right.T, values, rtol=0, atol=1e-12)


SHAPES = {"a": (12, 12), "b": (12, 30), "c": (30, 12), "d": (6, 40)}


def cost(ranks: dict[str, int]) -> int:
    """Numbers that are stored: a matrix that has no rank stays whole."""
    return sum(r * (p + q) if (r := ranks.get(n)) else p * q for n, (p, q) in SHAPES.items())


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.95])
def test_the_budget_is_met_within_one_rank(keep: float) -> None:
    total = sum(p * q for p, q in SHAPES.values())
    for name, rank in equal_ranks(SHAPES, keep).items():
        p, q = SHAPES[name]
        assert rank * (p + q) <= keep * p * q < (rank + 1) * (p + q)
    values = {n: torch.linalg.svdvals(randn(*s, seed=i)) for i, (n, s) in enumerate(SHAPES.items())}
    ranks = energy_ranks(SHAPES, values, keep)
    left = keep * total - cost(ranks)
    assert 0 <= left
    for name, rank in ranks.items():
        p, q = SHAPES[name]
        # One more rank, or what the matrix lacks to be whole, is more than there is left.
        assert left < min(p + q, p * q - rank * (p + q))


def kept_energy(ranks: dict[str, int], values: dict[str, Tensor]) -> float:
    shares = {name: value.square() / value.square().sum() for name, value in values.items()}
    return sum(share[: ranks.get(name)].sum().item() for name, share in shares.items())


def test_energy_goes_where_the_singular_values_are() -> None:
    """a is of rank 2 but for a little noise, b as far from low rank as can be."""
    values = {
        "a": torch.tensor([5.0, 4.0, *[0.01] * 10]),
        "b": torch.ones(12),
        "c": torch.arange(12.0, 0, -1),
        "d": torch.arange(6.0, 0, -1),
    }
    ranks = energy_ranks(SHAPES, values, 0.6)
    assert ranks["a"] == 2
    even = equal_ranks(SHAPES, 0.6)
    assert kept_energy(ranks, values) > kept_energy(even, values)
    # Of all choices within the budget, none keeps more by over a hundredth.
    limits = [range(1, p * q // (p + q) + 1) for p, q in SHAPES.values()]
    choices = (dict(zip(SHAPES, ranks, strict=True)) for ranks in product(*limits))
    budget = 0.6 * sum(p * q for p, q in SHAPES.values())
    best = max(kept_energy(ranks, values) for ranks in choices if cost(ranks) <= budget)
    assert kept_energy(ranks, values) > 0.99 * best


def test_a_matrix_that_would_not_become_smaller_stays_dense() -> None:
    flat = {name: torch.ones(min(shape)) for name, shape in SHAPES.items()}
    flat["d"] = torch.tensor([1.0, 0.9, 0.9, 0.9, 0.9, 0.9])
    ranks = energy_ranks(SHAPES, flat, 0.8)
    # Six ranks of 12 x 12 are its 144 numbers; five of 6 x 40 are 10 short of the matrix itself.
    assert ranks == {"c": 3}
    assert cost(ranks) <= 0.8 * sum(p * q for p, q in SHAPES.values())


def teacher_of(family: str, folder: Path, model_class: type = AutoModel) -> Path:
    config = config_of(family)
    config.pad_token_id = 0
    return write_model(folder, config, model_class)


def student_of(
    teacher: Path,
    out: Path,
    model_class: type = AutoModel,
    cut: dict | None = None,
    **given: object,
) -> Path:
    settings = StudentConfig(low_rank=LowRankConfig(**given))
    settings.from_teacher = None if cut is None else FromTeacherConfig(**cut)
    make_student(model_class, str(teacher), settings, out)
    return out


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(ours: nn.Module, theirs: nn.Module, atol: float = 1e-5) -> bool:
    return torch.allclose(ours(**text())[0], theirs(**text())[0], atol=atol)


@pytest.mark.parametrize("budget", ["ratio", "energy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_factors_loads_and_merges(family: str, budget: str, tmp_path: Path) -> None:
    """All that is loaded is what was factorised: each factor pair is the best approximation of the
    teacher's matrix, and the ordinary folder merged from it computes the same."""
    teacher = teacher_of(family, tmp_path / "t")
    # Gemma scales its embeddings in a class of its own.
    path = student_of(
        teacher, tmp_path / "s", keep=0.6, budget=budget, embeddings=family != "Gemma2"
    )
    student, truth = mlkd_dist.load_student(path), AutoModel.from_pretrained(teacher).eval()
    ranks = ranks_of(student.config)
    low = [m for m in student.modules() if isinstance(m, LowRankLinear | LowRankEmbedding)]
    assert len(low) == len(ranks) > 3
    dense_numbers = stored(truth)
    for name, rank in ranks.items():
        found, before = student.get_submodule(name), truth.get_submodule(name)
        left, right = found.second.weight, found.first.weight
        if isinstance(found, LowRankEmbedding):
            left, right = right, left.T
        weight = before.weight if not isinstance(before, transformers.Conv1D) else before.weight.T
        best, residue = torch.linalg.svdvals(weight.double()), (weight - left @ right).double()
        assert residue.square().sum().item() == pytest.approx(
            best[rank:].square().sum().item(), rel=1e-4
        )
        bias = getattr(before, "bias", None)
        assert bias is None or torch.equal(found.bias, bias)
        dense_numbers += rank * sum(weight.shape) - weight.numel()
    assert stored(student) == dense_numbers
    factorised = student(**text())[0]
    merged = merge(student)
    assert type(merged) is type(truth) and stored(merged) == stored(truth)
    merged.save_pretrained(tmp_path / "dense")
    assert "mlkd" not in (tmp_path / "dense" / "config.json").read_text()
    ordinary = AutoModel.from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(ordinary(**text())[0], factorised, atol=2e-5)
    # Far from the teacher, so that the comparison is not of a model that was never cut.
    assert not same(ordinary, truth, 1e-2)


@pytest.mark.parametrize("family", ["Bert", "GPT2", "Llama"])
def test_heads_and_ties_stay(family: str, tmp_path: Path) -> None:
    teacher = teacher_of(family, tmp_path / "t", AutoModelForSequenceClassification)
    path = student_of(teacher, tmp_path / "s", AutoModelForSequenceClassification)
    student = mlkd_dist.load_student(path)
    assert type(student).__name__ == f"{family}ForSequenceClassification"
    factorised = student(**text()).logits
    # The base model alone, as a teacher is loaded where no logits are read.
    base = mlkd_dist.load_student(path, AutoModel)
    assert torch.allclose(base(**text())[0], student.base_model(**text())[0], atol=1e-6)
    merge(student).save_pretrained(tmp_path / "dense")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(again(**text()).logits, factorised, atol=1e-5)


def test_a_tied_head_follows_the_embeddings(tmp_path: Path) -> None:
    teacher = teacher_of("Bert", tmp_path / "t", AutoModelForMaskedLM)
    student = mlkd_dist.load_student(student_of(teacher, tmp_path / "s", AutoModelForMaskedLM))
    head, table = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    assert head is table
    merged = merge(student)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    with pytest.raises(UserError, match="embeddings: BertForMaskedLM shares .* use false"):
        student_of(teacher, tmp_path / "x", AutoModelForMaskedLM, embeddings=True)


def test_transformers_alone_refuses_such_a_folder(tmp_path: Path) -> None:
    """Taken for an ordinary one, its matrices would be random numbers."""
    path = student_of(teacher_of("Bert", tmp_path / "t"), tmp_path / "s")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModel.from_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["BertModel"] and len(config["mlkd_low_rank"]) == 18
    assert config["mlkd_low_rank"]["encoder.layer.0.attention.self.query"] == 8
    assert "mlkd_dist.load_student" in (path / "README.md").read_text()


def test_an_ordinary_folder_loads_too(tmp_path: Path) -> None:
    teacher = teacher_of("Bert", tmp_path / "t")
    assert same(mlkd_dist.load_student(teacher), AutoModel.from_pretrained(teacher).eval(), 0)
    with pytest.raises(UserError, match="no weights for classifier.bias .2 missing in all"):
        mlkd_dist.load_student(teacher, AutoModelForSequenceClassification)


def test_a_class_that_transformers_lacks_is_asked_for(tmp_path: Path) -> None:
    path = student_of(teacher_of("Bert", tmp_path / "t"), tmp_path / "s")
    config = json.loads((path / "config.json").read_text()) | {"architectures": ["OurOwnBert"]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no OurOwnBert.*model_class"):
        mlkd_dist.load_student(path)
    assert mlkd_dist.load_student(path, AutoModel).config.architectures == ["OurOwnBert"]


def test_a_cut_student_is_factorised_after_the_cut(tmp_path: Path) -> None:
    teacher = teacher_of("Bert", tmp_path / "t")
    cut = {"layers": [0, 2], "heads": 2, "hidden": 24}
    path = student_of(teacher, tmp_path / "s", cut=cut, keep=0.7, matrices=["up", "down"])
    plain = tmp_path / "p"
    make_student(
        AutoModel, str(teacher), StudentConfig(from_teacher=FromTeacherConfig(**cut)), plain
    )
    student, dense = mlkd_dist.load_student(path), AutoModel.from_pretrained(plain).eval()
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 24)
    # 24 x 36 at 0.7 is rank 10.
    assert set(ranks_of(student.config).values()) == {10} and len(ranks_of(student.config)) == 4
    factorise(dense, plan(dense, LowRankConfig(0.7, ["up", "down"])))
    assert same(student, dense, 1e-6)


def test_a_factorised_teacher_can_be_cut(tmp_path: Path) -> None:
    first = student_of(teacher_of("Bert", tmp_path / "t"), tmp_path / "first")
    settings = StudentConfig(from_teacher=FromTeacherConfig(layers=[0, 1]))
    make_student(AutoModel, str(first), settings, tmp_path / "second")
    second, whole = AutoModel.from_pretrained(tmp_path / "second"), mlkd_dist.load_student(first)
    states = whole(**text(), output_hidden_states=True).hidden_states
    assert torch.allclose(second.eval()(**text())[0], states[2], atol=1e-5)


def test_a_part_of_the_depth_is_loaded(tmp_path: Path) -> None:
    from mlkd_dist.models.model import cut_layers, read_config

    path = student_of(teacher_of("Llama", tmp_path / "t"), tmp_path / "s")
    config = cut_layers(read_config(str(path)), [0, 1])
    options = {"dtype": "fp32", "attention": "sdpa"}
    shallow = load_model(AutoModel, str(path), config=config, **options).eval()
    whole = mlkd_dist.load_student(path)
    states = whole(**text(), output_hidden_states=True).hidden_states
    ours = shallow(**text(), output_hidden_states=True).hidden_states
    assert len(shallow.layers) == 2 and torch.allclose(ours[1], states[1], atol=1e-6)


def test_half_precision_keeps_its_type(tmp_path: Path) -> None:
    path = student_of(teacher_of("Bert", tmp_path / "t"), tmp_path / "s")
    student = mlkd_dist.load_student(path, dtype="bfloat16")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in merge(student).parameters()} == {torch.bfloat16}


def test_ranks_fit_the_notes_figures() -> None:
    """BERT-base at 0.5: 192 of the square matrices, 307 of the feed-forward ones."""
    shapes = {"query": (768, 768), "up": (768, 3072), "down": (3072, 768)}
    assert equal_ranks(shapes, 0.5) == {"query": 192, "up": 307, "down": 307}
    assert equal_ranks(shapes, 0.1) == {"query": 38, "up": 61, "down": 61}


def meta(family: str, model_class: type = AutoModel) -> nn.Module:
    with torch.device("meta"):
        return model_class.from_config(config_of(family))


REFUSED = {
    "'gate' is no matrix of BertModel; it has query, key": ("Bert", {"matrices": ["gate"]}),
    "computes query, key, value in one matrix .attn.c_attn.; name all": (
        "GPT2",
        {"matrices": ["query", "output"]},
    ),
    "computes gate, up in one matrix .mlp.Wi.": ("ModernBert", {"matrices": ["gate"]}),
    "keep: 0.01 leaves .*query no rank at all; use 0.0625 or more": ("Bert", {"keep": 0.01}),
    "keep: 0.01 leaves some matrix no rank at all; use 0.0581": (
        "Bert",
        {"keep": 0.01, "budget": "energy"},
    ),
    "Gemma2Model has word embeddings of its own kind": ("Gemma2", {"embeddings": True}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_factorised_is_refused_without_weights(message: str) -> None:
    family, given = REFUSED[message]
    with pytest.raises(UserError, match=message):
        check_plan(meta(family), LowRankConfig(**given))


def test_a_family_of_unknown_names_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(transformers.BioGptConfig(**COMMON))
    for layer in model.layers:
        layer.self_attn.q = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(UserError, match="layers of BioGptModel have no query that is known"):
        check_plan(model, LowRankConfig())
