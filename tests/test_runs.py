"""Whole runs of two processes: what is exported, what is logged, what repeats."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from conftest import BERT, LOGIT_LOSSES, LOSSES, WORDS, launch, logged, run_config, write_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
)

import mlkd_dist
from mlkd_dist.low_rank import merge
from mlkd_kernels import choose

STAGES = [0, 1, 2, 3]
SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
# As published: one token type only.
ROBERTA = dict(pad_token_id=0, type_vocab_size=1)
MODERN = dict(pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, teachers: dict, data: dict) -> dict[str, dict]:
    """Many small runs in the same two processes: name -> config."""
    base: Path = tmp_path_factory.mktemp("runs")

    def config(name: str, task: str = "classification", **changes: object) -> dict:
        folder = base / name
        folder.mkdir()
        return run_config(folder, teachers[task], data, task, **changes)

    two_stages = [
        {"name": "one", "steps": 3, "losses": {"hidden_mse": {}}},
        {"name": "two", "epochs": 0.5, "losses": {"hidden_mse": {}, "soft_labels": {}}, "lr": 1e-3},
    ]
    zero = {f"zero{s}": config(f"zero{s}", student__zero_stage=s) for s in STAGES}
    bf16 = {}
    for stage in STAGES:
        bf16[f"bf16-{stage}"] = config(f"bf16-{stage}", student__zero_stage=stage)
        bf16[f"bf16-{stage}"]["student"]["dtype"] = "bf16"
        bf16[f"bf16-{stage}"]["teacher"] |= {"dtype": "bf16", "zero_stage": 3}
    # Two micro-batches, so that the pass for the sample vectors must repeat the dropout.
    noisy = {"student__dropout": True, "batch__grad_accum": 2, "batch__micro_batch": 1}
    configs = zero | bf16
    configs |= {name: config(name, **noisy) for name in ("dropout", "dropout-again")}
    configs["checkpointing"] = config("checkpointing", student__zero_stage=3)
    configs["checkpointing"]["student"]["activation_checkpointing"] = "non_reentrant"
    configs["stages"] = config("stages", student__zero_stage=2, stages=two_stages, log_every=2)
    configs["embedding"] = config("embedding", task="embedding", student__zero_stage=3)
    factors = {"low_rank": {"keep": 0.6, "budget": "energy"}, "dropout": False}
    modules = {"module_mse": {}, "hidden_mse": {}, "attention_relation": {"of": ["query"]}}
    local = {"module_mse": {"input": "teacher", "of": ["key", "output", "down"]}, "soft_labels": {}}
    for stage in STAGES:
        name = f"factors{stage}"
        configs[name] = config(name, student=factors | {"zero_stage": stage})
        configs[name]["stages"] = [
            {"name": "own", "steps": 2, "losses": modules},
            {"name": "teacher", "steps": 3, "losses": local},
        ]
    configs["factors3"]["student"]["activation_checkpointing"] = "non_reentrant"
    configs["factors-bf16"] = config("factors-bf16", student=factors | {"zero_stage": 3})
    configs["factors-bf16"]["student"]["dtype"] = configs["factors-bf16"]["teacher"]["dtype"] = (
        "bf16"
    )
    configs["factors-bf16"]["teacher"]["zero_stage"] = 3
    configs["factors-bf16"]["stages"] = configs["factors3"]["stages"]
    # Joined matrices of the class Conv1D, and a head that is not factorised.
    gpt2 = GPT2Config(
        vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=64, num_labels=3, pad_token_id=0
    )
    configs["factors-gpt2"] = config("factors-gpt2", student=factors | {"zero_stage": 3})
    path = write_model(base / "gpt2", gpt2, AutoModelForSequenceClassification)
    configs["factors-gpt2"]["teacher"] |= {"path": str(path), "zero_stage": 3}
    configs["factors-gpt2"]["stages"] = configs["factors3"]["stages"]
    # Students of other families than their teacher, a BERT.
    for family, given in (("Roberta", ROBERTA), ("ModernBert", MODERN)):
        made = getattr(transformers, f"{family}Config")(**BERT | SMALL | given, num_labels=3)
        path = write_model(base / f"{family}-model", made, AutoModelForSequenceClassification)
        own = {"path": str(path), "zero_stage": 2, "dropout": False}
        configs[family] = config(family, student=own, data__text_pair="other")
        configs[family]["teacher"]["zero_stage"] = 3
    for name in ("factors3", "factors-gpt2", "zero3"):
        configs[name]["run"]["compare_maps"] = True
    configs["workers"] = config("workers", data__workers=1)
    configs["packed"] = config("packed", "causal_lm", data__pack=True, student__zero_stage=3)
    packed = {"soft_labels": {"kind": "skew_reverse_kl"}, "hard_labels": {}, "hidden_mse": {}}
    configs["packed"]["stages"][0]["losses"] = packed
    configs["packed"]["teacher"]["zero_stage"] = 3
    configs["pairs"] = config("pairs", data__text_pair="other")
    configs["regression"] = config("regression", "regression", data__text_pair="other")
    configs["regression"]["data"]["label"] = "score"
    questions = write_questions(base / "questions.jsonl")
    spans = {"train": questions, "text": "question", "text_pair": "passage", "label": "answers"}
    spans |= {"validation": None, "validation_fraction": 0.3, "max_length": 24}
    configs["answers"] = config("answers", "question_answering", student__zero_stage=3)
    configs["answers"]["data"] |= spans
    mixed = {key: with_bad_rows(Path(path), base / f"{key}.jsonl") for key, path in data.items()}
    configs["bad rows"] = config("bad rows", data__max_bad=2)
    configs["bad rows"]["data"] |= mixed
    # Four layers of the teacher's width, and no head.
    headless = {"path": str(teachers["embedding"]), "zero_stage": 3}
    configs["headless"] = config("headless", student=headless)
    launch(list(configs.values()), base / "logs", world=2)
    return configs


def with_bad_rows(good: Path, path: Path) -> str:
    """One on the first line; and one after the fifth that is good."""
    lines = good.read_bytes().splitlines(keepends=True)
    outside = b'{"text": "w1", "label": 3}\n'
    path.write_bytes(b"".join([b"na\xefve\n", *lines[:5], outside, *lines[5:]]))
    return str(path)


def write_questions(path: Path) -> str:
    """Which word comes after this one? In passages of one and of two windows; some do not say."""
    draw = random.Random(0)
    with path.open("w") as file:
        for length in [10, 30] * 10:
            words = draw.sample(WORDS, length)
            passage, asked = " ".join(words), draw.randrange(length - 1)
            found = words[asked + 1]
            answers = {"text": [found], "answer_start": [f" {passage} ".index(f" {found} ")]}
            if draw.random() < 0.3:
                answers = {"text": [], "answer_start": []}
            row = {"question": words[asked], "passage": passage, "answers": answers}
            file.write(json.dumps(row) + "\n")
    return str(path)


def folder(config: dict) -> Path:
    return Path(config["run"]["dir"])


def trained(config: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and outputs of the student in its engine after the last step; see many_runs.py."""
    kept = torch.load(folder(config) / "trained.pt", weights_only=True)
    return kept["inputs"], kept["output"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_export_gives_the_trained_logits(runs: dict, stage: int) -> None:
    inputs, logits = trained(runs[f"zero{stage}"])
    model = AutoModelForSequenceClassification.from_pretrained(
        folder(runs[f"zero{stage}"]) / "export"
    )
    assert torch.allclose(model.eval()(**inputs).logits, logits, atol=1e-5)
    # It has learned something: the student it started from gives other logits.
    start = AutoModelForSequenceClassification.from_pretrained(
        folder(runs[f"zero{stage}"]) / "student"
    )
    assert not torch.allclose(start.eval()(**inputs).logits, logits, atol=1e-2)


def test_the_export_gives_the_trained_vectors(runs: dict) -> None:
    inputs, states = trained(runs["embedding"])
    model = AutoModel.from_pretrained(folder(runs["embedding"]) / "export").eval()
    assert torch.allclose(model(**inputs).last_hidden_state, states, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_and_exports(runs: dict, stage: int) -> None:
    config = runs[f"bf16-{stage}"]
    inputs, logits = trained(config)
    assert logits.dtype == torch.bfloat16
    model = AutoModelForSequenceClassification.from_pretrained(
        folder(config) / "export", dtype=torch.bfloat16
    ).eval()
    assert torch.allclose(model(**inputs).logits.float(), logits.float(), atol=0.05)
    # 8 bits of mantissa, against the same run in fp32.
    ours, theirs = logged(config), logged(runs[f"zero{stage}"])
    assert ours[0]["loss/total"] == pytest.approx(theirs[0]["loss/total"], rel=0.05)
    assert ours[4]["loss/total"] < 0.8 * ours[0]["loss/total"]


@pytest.mark.parametrize("stage", STAGES)
def test_factors_train_and_are_exported_at_every_stage(runs: dict, stage: int) -> None:
    config = runs[f"factors{stage}"]
    inputs, logits = trained(config)
    student = mlkd_dist.load_student(folder(config) / "export")
    assert type(student).__name__ == "BertForSequenceClassification"
    assert torch.allclose(student(**inputs).logits, logits, atol=1e-5)
    numbers = sum(p.numel() for p in student.parameters())
    report = json.loads((folder(config) / "report.json").read_text())
    assert report["student"]["parameters"] == report["student_before"]["parameters"] == numbers
    # Four layers of 4 x 48 x 48 and 2 x 48 x 64 numbers at 0.6, but for a rank each at most.
    saved = report["teacher"]["parameters"] - numbers
    assert 0.4 * 4 * 15360 <= saved < 0.4 * 4 * 15360 + 112
    before = mlkd_dist.load_student(folder(config) / "student")
    assert not torch.allclose(before(**inputs).logits, logits, atol=1e-2)
    merge(student)
    assert torch.allclose(student(**inputs).logits, logits, atol=1e-5)
    for ours, theirs in zip(logged(config), logged(runs["factors0"]), strict=True):
        for name in (key for key in theirs if key.startswith("loss/") or key == "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_factors_of_a_decoder(runs: dict) -> None:
    config = runs["factors-gpt2"]
    inputs, logits = trained(config)
    student = mlkd_dist.load_student(folder(config) / "export")
    assert torch.allclose(student(**inputs).logits, logits, atol=1e-5)
    assert torch.allclose(merge(student)(**inputs).logits, logits, atol=1e-5)
    assert logged(config)[4]["loss/module_mse"] < logged(config)[2]["loss/module_mse"]


def test_factors_train_in_half_precision(runs: dict) -> None:
    config = runs["factors-bf16"]
    inputs, logits = trained(config)
    student = mlkd_dist.load_student(folder(config) / "export")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert torch.allclose(student(**inputs).logits.float(), logits.float(), atol=0.05)
    ours, theirs = logged(config), logged(runs["factors0"])
    for step in (0, 2):
        assert ours[step]["loss/module_mse"] == pytest.approx(
            theirs[step]["loss/module_mse"], rel=0.1
        )


def test_pairs_of_texts_reach_the_model_as_pairs(runs: dict) -> None:
    inputs, logits = trained(runs["pairs"])
    # [CLS] one [SEP] other [SEP]
    assert all(row.count(3) == 2 for row in inputs["input_ids"].tolist())
    assert inputs["token_type_ids"].max() == 1
    model = AutoModelForSequenceClassification.from_pretrained(folder(runs["pairs"]) / "export")
    assert torch.allclose(model.eval()(**inputs).logits, logits, atol=1e-5)


@pytest.mark.parametrize("family", ["Roberta", "ModernBert"])
def test_a_student_of_another_family_learns(runs: dict, family: str) -> None:
    """From pairs, whose second text has a token type that neither family knows."""
    inputs, logits = trained(runs[family])
    assert inputs["token_type_ids"].max() == 1
    path = folder(runs[family]) / "export"
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert type(model).__name__.startswith(family)
    taken = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.allclose(model(**taken).logits, logits, atol=1e-5)
    rows = logged(runs[family])
    for name in LOSSES | LOGIT_LOSSES:
        assert 0 < rows[-1][f"loss/{name}"]
    assert rows[-1]["loss/total"] < 0.95 * rows[0]["loss/total"]


def test_a_regression_learns_numbers(runs: dict) -> None:
    rows = logged(runs["regression"])
    assert rows[-1]["loss/hard_labels"] < 0.9 * rows[0]["loss/hard_labels"]
    assert rows[-1]["loss/soft_labels"] > 0
    path = folder(runs["regression"])
    report = json.loads((path / "report.json").read_text())
    assert set(report["student"]["agreement"]) == {"pearson", "spearman", "mse"}
    # The held-out pairs one by one, without any of our code.
    tokenizer = AutoTokenizer.from_pretrained(path / "export")
    model = AutoModelForSequenceClassification.from_pretrained(path / "export").eval()
    lines = Path(runs["regression"]["data"]["validation"]).read_text().splitlines()
    found, truth = [], []
    for row in map(json.loads, lines):
        inputs = tokenizer(row["text"], row["other"], return_tensors="pt")
        found.append(model(**inputs).logits.item())
        truth.append(row["score"])
    expected = torch.corrcoef(torch.tensor([found, truth]))[0, 1].item()
    assert report["student"]["quality"]["pearson"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["factors3", "factors-gpt2"])
def test_the_report_tells_how_far_the_attention_maps_are(runs: dict, name: str) -> None:
    """By both models' own maps, without any of our code but for reading the factors."""
    path, config = folder(runs[name]), runs[name]
    tokenizer = AutoTokenizer.from_pretrained(path / "export")
    student = mlkd_dist.load_student(path / "export")
    teacher = AutoModelForSequenceClassification.from_pretrained(config["teacher"]["path"])
    for model in (student, teacher):
        model.eval().set_attn_implementation("eager")
    total, tokens = 0.0, 0
    for line in Path(config["data"]["validation"]).read_text().splitlines():
        inputs = tokenizer(json.loads(line)["text"], return_tensors="pt")
        with torch.no_grad():
            ours, theirs = (
                m(**inputs, output_attentions=True).attentions for m in (student, teacher)
            )
        for q, p in zip(ours, theirs, strict=True):
            gap = torch.where(p > 0, p * (p.log() - q.log()), 0).sum(-1)  # [1, H, L]
            total += gap.mean(1).sum().item()
        tokens += inputs["input_ids"].shape[1]
    agreement = json.loads((path / "report.json").read_text())["student"]["agreement"]
    assert (
        agreement["attention_kl"] == pytest.approx(total / tokens, rel=1e-3, abs=1e-7) and total > 0
    )


def test_answers_are_learned_and_measured(runs: dict) -> None:
    inputs, starts = trained(runs["answers"])
    model = AutoModelForQuestionAnswering.from_pretrained(folder(runs["answers"]) / "export")
    real = inputs["attention_mask"].bool()
    assert torch.allclose(model.eval()(**inputs).start_logits[real], starts[real], atol=1e-5)
    rows = logged(runs["answers"])
    assert rows[-1]["loss/hard_labels"] < 0.95 * rows[0]["loss/hard_labels"]
    assert rows[-1]["loss/soft_labels"] > 0
    report = json.loads((folder(runs["answers"]) / "report.json").read_text())
    # Six of twenty rows are held out; the long ones are two windows each.
    assert 6 < report["held_out_rows"] <= 12
    assert set(report["student"]["quality"]) == {"em", "f1"}
    assert 0 <= report["student"]["agreement"]["same_answer"] <= 1


def test_a_student_without_a_head_gets_that_of_its_teacher(runs: dict) -> None:
    inputs, logits = trained(runs["headless"])
    path = folder(runs["headless"])
    model = AutoModelForSequenceClassification.from_pretrained(path / "export")
    assert torch.allclose(model.eval()(**inputs).logits, logits, atol=1e-5)
    assert model.config.num_labels == 3 and model.config.num_hidden_layers == 4
    report = json.loads((path / "report.json").read_text())
    assert "student_before" not in report and "kl" in report["student"]["agreement"]


def test_an_export_is_an_ordinary_folder(runs: dict) -> None:
    export = folder(runs["zero3"]) / "export"
    config = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]) == (
        2,
        2,
        24,
    )
    assert "mlkd" not in json.dumps(config) and config["hidden_dropout_prob"] == 0.1
    assert AutoTokenizer.from_pretrained(export)("w1 w2")["input_ids"] == [2, 6, 7, 3]
    assert not list(folder(runs["zero3"]).glob("*.partial"))


def test_runs_repeat_bit_for_bit_with_dropout(runs: dict) -> None:
    timing = {"rows_per_s", "teacher_share", "peak_gib"}

    def values(name: str) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in timing} for row in logged(runs[name])]

    assert values("dropout") == values("dropout-again")
    assert values("dropout")[0]["loss/total"] != values("zero0")[0]["loss/total"]


def test_checkpointing_changes_nothing(runs: dict) -> None:
    for ours, theirs in zip(logged(runs["checkpointing"]), logged(runs["zero3"]), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_loader_processes_change_nothing(runs: dict) -> None:
    ours, theirs = logged(runs["workers"]), logged(runs["zero0"])
    assert [row["loss/total"] for row in ours] == [row["loss/total"] for row in theirs]


def test_stages_follow_one_another(runs: dict) -> None:
    """Steps count on; the last step of a stage is logged; 17 rows in batches of 8 make 3 steps an
    epoch."""
    rows = logged(runs["stages"])
    assert [(row["stage"], row["step"]) for row in rows] == [("one", 1), ("one", 2), ("two", 4)]
    assert "loss/soft_labels" in rows[2] and "loss/soft_labels" not in rows[0]
    # The projection that stage one trained is used again: stage two starts where it ended.
    assert rows[2]["loss/hidden_mse"] < rows[0]["loss/hidden_mse"]


def test_a_logged_row_is_complete(runs: dict) -> None:
    row = logged(runs["zero2"])[0]
    losses = {f"loss/{name}" for name in ("total", *runs["zero2"]["stages"][0]["losses"])}
    rest = {
        "step",
        "stage",
        "lr",
        "grad_norm",
        "rows_per_s",
        "teacher_share",
        "peak_gib",
        "backend",
        "skipped_steps",
    }
    assert set(row) == losses | rest and row["backend"] == choose("auto")
    assert 0 < row["teacher_share"] < 1 and row["rows_per_s"] > 0 and row["peak_gib"] > 0
    total = sum(row[name] for name in losses - {"loss/total"})
    assert row["loss/total"] == pytest.approx(total, rel=1e-5)


def test_tensorboard_has_the_same_numbers(runs: dict) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder(runs["zero2"]) / "tb"))
    events.Reload()
    for tag in ("loss/total", "loss/hidden_mse", "lr", "grad_norm", "teacher_share"):
        seen = [(event.step, event.value) for event in events.Scalars(tag)]
        told = [(row["step"], row[tag]) for row in logged(runs["zero2"])]
        assert seen == [(step, pytest.approx(value, rel=1e-6)) for step, value in told]


def test_the_report_compares_teacher_and_student(runs: dict) -> None:
    report = json.loads((folder(runs["zero2"]) / "report.json").read_text())
    assert report["held_out_rows"] == 7
    teacher, before, after = report["teacher"], report["student_before"], report["student"]
    assert teacher["parameters"] > after["parameters"] == before["parameters"]
    export = AutoModelForSequenceClassification.from_pretrained(folder(runs["zero2"]) / "export")
    assert after["parameters"] == sum(p.numel() for p in export.parameters())
    for model in (teacher, before, after):
        assert set(model["quality"]) == {"accuracy", "f1", "mcc"}
    assert teacher["latency_ms"] > 0 and after["latency_ms"] > 0 and before["latency_ms"] is None
    for name, path in (("student_before", "student"), ("student", "export")):
        kl = plain_kl(runs["zero2"], folder(runs["zero2"]) / path)
        assert report[name]["agreement"]["kl"] == pytest.approx(kl, rel=1e-3)


def plain_kl(config: dict, student: Path) -> float:
    """KL(teacher || student) on the held-out texts, one by one, without any of our code."""
    rows = [
        json.loads(line) for line in Path(config["data"]["validation"]).read_text().splitlines()
    ]
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [
        AutoModelForSequenceClassification.from_pretrained(path).eval()
        for path in (config["teacher"]["path"], student)
    ]
    total = 0.0
    for row in rows:
        inputs = tokenizer(row["text"], truncation=True, max_length=48, return_tensors="pt")
        p, q = (model(**inputs).logits.log_softmax(-1) for model in models)
        total += (p.exp() * (p - q)).sum().item()
    return total / len(rows)


def test_a_packed_decoder_learns_and_reports_its_perplexity(runs: dict) -> None:
    rows = logged(runs["packed"])
    assert rows[4]["loss/total"] < 0.9 * rows[0]["loss/total"]
    report = json.loads((folder(runs["packed"]) / "report.json").read_text())
    for name, path in (("student_before", "student"), ("student", "export")):
        truth = plain_perplexity(runs["packed"], folder(runs["packed"]) / path)
        assert report[name]["quality"]["perplexity"] == pytest.approx(truth, rel=1e-3)
    assert 0 < report["student"]["agreement"]["same_token"] < 1


def plain_perplexity(config: dict, path: Path) -> float:
    """Of the held-out texts, one by one, without any of our code."""
    lines = Path(config["data"]["validation"]).read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    losses = []
    for line in lines:
        # The end of a text is no token here, since the tokenizer names none.
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:-1]])
        with torch.no_grad():
            log_q = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_q.gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1))
    return torch.cat(losses).mean().exp().item()


def test_attention_maps_of_other_heads_are_not_compared(runs: dict) -> None:
    report = json.loads((folder(runs["zero3"]) / "report.json").read_text())
    assert "attention_kl" not in report["student"]["agreement"]


def test_every_zero_stage_reports_the_same_model(runs: dict) -> None:
    reports = [json.loads((folder(runs[f"zero{s}"]) / "report.json").read_text()) for s in STAGES]
    for report in reports[1:]:
        assert report["teacher"]["parameters"] == reports[0]["teacher"]["parameters"]
        kl = report["student"]["agreement"]["kl"]
        assert kl == pytest.approx(reports[0]["student"]["agreement"]["kl"], rel=1e-3)


def test_a_run_goes_on_without_bad_rows(runs: dict) -> None:
    """As the run on the same data without them, to the bit."""
    config, clean = runs["bad rows"], runs["zero0"]
    for ours, theirs in zip(logged(config), logged(clean), strict=True):
        for name in (key for key in theirs if key.startswith("loss/") or key == "grad_norm"):
            assert ours[name] == theirs[name], name
    report, other = (json.loads((folder(c) / "report.json").read_text()) for c in (config, clean))
    assert report["student"]["quality"] == other["student"]["quality"]
    assert report["bad_rows"] == {"data.train": 2, "data.validation": 2}
    assert other["bad_rows"] == {"data.train": 0, "data.validation": 0}
    lines = (folder(config) / "quarantine.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [(row["data"], row["line"]) for row in listed] == [
        (key, line) for key in ("data.train", "data.validation") for line in (1, 7)
    ]
    assert "not UTF-8" in listed[0]["reason"] and "label 3 is outside" in listed[1]["reason"]
    assert listed[1]["content"] == '{"text": "w1", "label": 3}'
    assert not (folder(clean) / "quarantine.jsonl").exists()
