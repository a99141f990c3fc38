"""Students cut out of teachers: which weights they start from, which shapes they have, which are
refused."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import write_model, write_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from mlkd_dist.config import FromTeacherConfig, StudentConfig, UserError
from mlkd_dist.models.linears import layer_matrices, part
from mlkd_dist.models.roles import NAMES
from mlkd_dist.models.tap import layer_modules
from mlkd_dist.student import load_student, make_student

BASE = dict(
    vocab_size=64,
    hidden_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {
    "Bert": BASE,
    "Roberta": BASE,
    "Electra": BASE,
    "Albert": BASE | {"embedding_size": 16},
    "DistilBert": dict(vocab_size=64, dim=48, n_layers=6, n_heads=4, hidden_dim=64),
    "ModernBert": BASE | {"cls_token_id": 1, "sep_token_id": 2},
    "GPT2": dict(vocab_size=64, n_embd=48, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=2),
    "OPT": dict(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=48,
    ),
    "GPTNeoX": BASE,
    "Persimmon": BASE,
    "Phi": BASE,
    "Llama": BASE | {"num_key_value_heads": 2},
    "Qwen3": BASE | {"num_key_value_heads": 2, "head_dim": 16},
}


def teacher_of(family: str, folder: Path, model_class: type = AutoModel) -> Path:
    return write_model(
        folder, getattr(transformers, f"{family}Config")(**FAMILIES[family]), model_class
    )


def cut(
    teacher: Path, out: Path, model_class: type = AutoModel, **settings: object
) -> torch.nn.Module:
    given = StudentConfig(from_teacher=FromTeacherConfig(**settings))
    make_student(model_class, str(teacher), given, out)
    return model_class.from_pretrained(out).eval()


def text() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "input_ids": torch.randint(3, 60, (2, 9)),
        "attention_mask": torch.ones(2, 9, dtype=int),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_and_heads_is_the_teacher_itself(family: str, tmp_path: Path) -> None:
    teacher = teacher_of(family, tmp_path / "t")
    student = cut(teacher, tmp_path / "s")
    truth = AutoModel.from_pretrained(teacher).eval()
    for ours, theirs in zip(student(**text())[0], truth(**text())[0], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Albert"])
def test_listed_layers_are_the_teachers(family: str, tmp_path: Path) -> None:
    """The first layers in order are what the teacher computes up to there, before a final norm."""
    teacher = teacher_of(family, tmp_path / "t")
    student = cut(teacher, tmp_path / "s", layers=[0, 1, 2])
    truth = AutoModel.from_pretrained(teacher).eval()
    theirs = truth(**text(), output_hidden_states=True).hidden_states
    ours = student(**text(), output_hidden_states=True).hidden_states
    assert len(ours) == 4 and len(theirs) == 7
    assert torch.allclose(ours[2], theirs[2], atol=1e-6)
    assert (tmp_path / "s" / "tokenizer.json").exists()


def test_a_number_of_layers_is_spread_as_the_uniform_map(tmp_path: Path) -> None:
    teacher = teacher_of("Bert", tmp_path / "t")
    student = cut(teacher, tmp_path / "s", layers=3)
    truth = AutoModel.from_pretrained(teacher)
    for ours, theirs in enumerate((1, 3, 5)):
        weight = truth.encoder.layer[theirs].output.dense.weight
        assert torch.equal(student.encoder.layer[ours].output.dense.weight, weight)
    assert torch.equal(
        student.embeddings.word_embeddings.weight, truth.embeddings.word_embeddings.weight
    )


def test_the_head_of_the_task_is_copied(tmp_path: Path) -> None:
    teacher = teacher_of("Bert", tmp_path / "t", AutoModelForSequenceClassification)
    student = cut(teacher, tmp_path / "s", AutoModelForSequenceClassification, layers=2)
    truth = AutoModelForSequenceClassification.from_pretrained(teacher)
    assert torch.equal(student.classifier.weight, truth.classifier.weight)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12, 48])
def test_any_head_count_that_divides_the_width(heads: int, tmp_path: Path) -> None:
    student = cut(teacher_of("Bert", tmp_path / "t"), tmp_path / "s", heads=heads)
    assert student.config.num_attention_heads == heads
    assert torch.isfinite(student(**text())[0]).all()


def test_heads_of_grouped_queries_keep_the_width(tmp_path: Path) -> None:
    teacher = teacher_of("Qwen3", tmp_path / "t")
    student = cut(teacher, tmp_path / "s", heads=2)
    assert (student.config.head_dim, student.config.num_key_value_heads) == (32, 1)
    truth = AutoModel.from_pretrained(teacher)
    assert torch.equal(
        student.layers[0].self_attn.k_proj.weight, truth.layers[0].self_attn.k_proj.weight
    )


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Persimmon"])
def test_heads_of_joined_queries_keys_and_values_are_regrouped(
    family: str, heads: int, tmp_path: Path
) -> None:
    """Also where those of a head lie side by side: each role still makes the same columns."""
    teacher = teacher_of(family, tmp_path / "t")
    student = cut(teacher, tmp_path / "s", heads=heads)
    truth, x = AutoModel.from_pretrained(teacher), torch.randn(1, 5, 48)
    ours, theirs = (layer_matrices(layer_modules(model)[2]) for model in (student, truth))
    (name,) = (name for name in theirs if len(NAMES[name]) == 3)
    for role in ("query", "key", "value"):
        expected = part(name, role, theirs[name](x), 4)
        assert torch.equal(part(name, role, ours[name](x), heads), expected)


def test_a_layer_becomes_one_of_its_own_kind(tmp_path: Path) -> None:
    """Here the first one alone has a dense feed-forward, and says so by its index."""
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    config = transformers.Qwen3MoeConfig(**BASE, **experts, mlp_only_layers=[0])
    teacher = write_model(tmp_path / "t", config, AutoModel)
    with pytest.raises(UserError, match=r"have layers.0.mlp.gate_proj.weight, .* no layers.1.mlp"):
        cut(teacher, tmp_path / "s", layers=[1, 2])
    student, truth = cut(teacher, tmp_path / "s", layers=[0, 3]), AutoModel.from_pretrained(teacher)
    for ours, theirs in ((0, 0), (1, 3)):
        names = [
            layer_modules(model)[i].state_dict() for model, i in ((student, ours), (truth, theirs))
        ]
        assert all(torch.equal(names[0][name], weight) for name, weight in names[1].items())


@pytest.mark.parametrize(
    ("family", "cut_to"),
    [("Qwen3", {"hidden": 33}), ("Llama", {"hidden": 36}), ("Phi", {"heads": 8})],
)
def test_heads_that_positions_cannot_turn_are_refused(
    family: str, cut_to: dict, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="positions turn .* in pairs; use another width or number"):
        cut(teacher_of(family, tmp_path / "t"), tmp_path / "s", **cut_to)


@pytest.mark.parametrize(("family", "heads"), [("Bert", 5), ("Qwen3", 3)])
def test_heads_that_do_not_fit_are_refused(family: str, heads: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"heads: {heads} does not fit a teacher of 4 heads"):
        cut(teacher_of(family, tmp_path / "t"), tmp_path / "s", heads=heads)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "OPT", "Llama", "Qwen3"])
def test_a_narrower_student_keeps_leading_coordinates(family: str, tmp_path: Path) -> None:
    teacher = teacher_of(family, tmp_path / "t")
    student = cut(teacher, tmp_path / "s", layers=2, hidden=24)
    assert student.config.hidden_size == 24
    assert torch.isfinite(student(**text())[0]).all()
    theirs = AutoModel.from_pretrained(teacher).get_input_embeddings().weight
    assert torch.equal(student.get_input_embeddings().weight, theirs[:, :24])


def test_narrowing_a_joined_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="c_attn.* joins several matrices"):
        cut(teacher_of("GPT2", tmp_path / "t"), tmp_path / "s", hidden=24)


def test_layer_lists_in_the_config_follow_the_layers(tmp_path: Path) -> None:
    """ModernBERT alternates kinds of attention; a layer keeps its own kind."""
    teacher = teacher_of("ModernBert", tmp_path / "t")
    kinds = AutoConfig.from_pretrained(teacher).layer_types
    student = cut(teacher, tmp_path / "s", layers=[0, 3, 4])
    assert student.config.layer_types == [kinds[0], kinds[3], kinds[4]]
    assert len(set(kinds)) == 2


def test_dropout_is_turned_off_in_the_modules_only(tmp_path: Path) -> None:
    teacher = teacher_of("Bert", tmp_path / "t")
    settings = StudentConfig(path=str(teacher), dropout=False)
    model = load_student(AutoModel, str(teacher), settings, {}, None, False).train()
    inputs = text()
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    assert model.config.hidden_dropout_prob == 0.1
    settings.dropout = True
    model = load_student(AutoModel, str(teacher), settings, {}, None, False).train()
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])


def test_missing_weights_are_refused_unless_a_new_head_is_asked_for(tmp_path: Path) -> None:
    teacher, settings = teacher_of("Bert", tmp_path / "t"), StudentConfig()
    headed = AutoModelForSequenceClassification
    with pytest.raises(UserError, match="no weights for classifier.*teacher.finetune"):
        load_student(headed, str(teacher), settings, {}, None, False)
    model = load_student(headed, str(teacher), settings, {}, 5, False)
    assert model.config.num_labels == model.classifier.out_features == 5


DROPS = ("dropout", "attention_dropout", "residual_dropout", "embedding_dropout", "layerdrop")
DROPPING = {
    **{family: FAMILIES[family] for family in ("Bert", "GPT2", "OPT", "Persimmon", "Llama")},
    "Starcoder2": BASE | {"num_key_value_heads": 2},
    "SeedOss": BASE | {"num_key_value_heads": 2, "head_dim": 12},
    "GPTBigCode": BASE,
}


@pytest.mark.parametrize("family", DROPPING)
def test_dropout_that_is_off_is_off_in_every_family(family: str, tmp_path: Path) -> None:
    """And what is exported has it as it came."""
    config = getattr(transformers, f"{family}Config")(**DROPPING[family])
    shares = {n: 0.4 for n in vars(config) if n in DROPS or "pdrop" in n or n.endswith("dropout")}
    for name, value in (shares | {"hidden_dropout_prob": 0.4}).items():
        setattr(config, name, value)
    folder = write_model(tmp_path / "t", config, AutoModel)
    found, inputs = {}, text()
    for dropout in (False, True):
        settings = StudentConfig(dropout=dropout)
        model = load_student(AutoModel, str(folder), settings, {}, None, False).train()
        found[dropout] = [model(**inputs)[0] for _ in range(2)]
        assert {n: getattr(model.config, n) for n in shares} == shares
    assert torch.equal(*found[False]) and not torch.equal(*found[True])


def test_checkpointing_that_a_family_lacks_is_refused(tmp_path: Path) -> None:
    settings = StudentConfig(activation_checkpointing="non_reentrant")
    with pytest.raises(UserError, match="AlbertModel does not support it; use none"):
        load_student(
            AutoModel, str(teacher_of("Albert", tmp_path / "t")), settings, {}, None, False
        )


def test_a_tokenizer_travels_with_the_student(tmp_path: Path) -> None:
    teacher = teacher_of("Bert", tmp_path / "t")
    write_tokenizer(teacher, ["only", "these", "words"])
    cut(teacher, tmp_path / "s", layers=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "s")
    assert tokenizer("these words")["input_ids"] == [2, 6, 7, 3]
