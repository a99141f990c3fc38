"""Learning from generated answers: which steps, which tokens, and whole runs of two processes."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import WORDS, logged, made_tokenizer, run_config, start
from test_causal_lm import PAIRS, TEMPLATE, rows_of, task_of
from test_generate import by_hand
from test_head import language_model
from test_parity import check_parity
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mlkd_dist.config import OnPolicyConfig, StageConfig
from mlkd_dist.generation import on_policy
from mlkd_dist.generation.generate import generate
from mlkd_dist.generation.on_policy import Policy, Twin, speaks
from mlkd_dist.inputs.batches import Sampler
from mlkd_dist.processes.world import World
from mlkd_dist.tasks._rouge import rouge_l

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return made_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE)


TIMING = {"rows_per_s", "teacher_share", "peak_gib", "on_policy/seconds"}


class Mute:
    """Stands for who speaks; what is said comes from a stand-in of `generate`."""

    sharded = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        yield None


def policy_of(tokenizer: Any, world: World = None, seed: int = 0, **settings: Any) -> Policy:
    run = SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(seed=seed), data=SimpleNamespace(max_length=16)),
        world=world or World(0, 1, 0, CPU),
        task=task_of(prompt="question", completion="answer"),
        tokenizer=tokenizer,
    )
    return Policy(OnPolicyConfig(**settings), run, Mute())


def given(policy: Policy, keep: list[bool]) -> Any:
    rows = rows_of(policy.run.task, policy.run.tokenizer, PAIRS)
    batch = policy.run.task.collate(rows, keep, policy.run.tokenizer)
    return replace(batch, rows=rows)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_labels_of_an_answer_by_hand(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    side: str,
) -> None:
    """w0 has the number 5; prompts "[CLS] w0 w1" and "[CLS] w2", answered by 20 21 [SEP] and 22."""
    policy = policy_of(tokenizer, fraction=1.0)
    asked: list[Any] = []

    def answers(*said: Any) -> list[list[int]]:
        asked.append(said)
        return [[20, 21, 3], [22]]

    monkeypatch.setattr(on_policy, "generate", answers)
    monkeypatch.setattr(tokenizer, "padding_side", side)
    (batch,) = policy(0, [given(policy, [True, True])])
    assert asked[0][1] == [[2, 5, 6], [2, 7]] and asked[0][4:6] == (64, 16)
    first, labels = [2, 5, 6, 20, 21, 3], [-100, -100, 20, 21, 3, -100]
    assert batch.inputs["input_ids"][0].tolist() == first and batch.labels[0].tolist() == labels
    short, its = ([2, 7, 22], [-100, 22, -100]), ([0, 0, 0], [-100] * 3)
    ids, labels = (short[i] + its[i] if side == "right" else its[i] + short[i] for i in (0, 1))
    assert batch.inputs["input_ids"][1].tolist() == ids and batch.labels[1].tolist() == labels
    real = [1, 1, 1, 0, 0, 0]
    assert batch.inputs["attention_mask"][1].tolist() == (real if side == "right" else real[::-1])
    places = [0, 1, 2, 0, 0, 0] if side == "right" else [0, 0, 0, 0, 1, 2]
    assert batch.inputs["position_ids"][1].tolist() == places
    assert torch.equal(batch.label_keep, batch.labels != -100) and len(batch.label_rows) == 4
    # A row that only fills the batch has no label, and is not counted.
    (batch,) = policy(1, [given(policy, [True, False])])
    assert batch.label_keep.sum(1).tolist() == [3, 0] and batch.keep.tolist() == [True, False]
    row = policy.logged(4)
    assert row["on_policy/share"] == 0.5 and row["on_policy/length"] == (4 + 3) / 3
    assert row["on_policy/seconds"] >= 0
    assert policy.logged(4) == {"on_policy/share": 0}


def test_which_steps_is_a_matter_of_seed_and_step(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    worlds = [World(0, 1, 0, CPU), World(1, 2, 1, CPU)]
    ours, theirs = (
        [policy_of(tokenizer, w, fraction=0.3).takes(s) for s in range(2000)] for w in worlds
    )
    assert ours == theirs and sum(ours) == pytest.approx(600, abs=60)
    other = [policy_of(tokenizer, seed=1, fraction=0.3).takes(s) for s in range(2000)]
    assert 0.5 < sum(a == b for a, b in zip(ours, other, strict=True)) / 2000 < 0.7
    assert all(policy_of(tokenizer, fraction=1.0).takes(s) for s in range(50))
    assert speaks(StageConfig()) is None
    assert speaks(StageConfig(on_policy=OnPolicyConfig(fraction=0.0))) is None


@pytest.mark.usefixtures("one_process")
def test_the_numbers_of_a_row_are_those_of_its_place_in_the_global_batch(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []

    def answers(*said: Any) -> list[list[int]]:
        seen.append(said[-1][-1].numbers)
        return [[9]] * len(said[1])

    monkeypatch.setattr(on_policy, "generate", answers)

    def numbers(world: World, micro_batches: int) -> torch.Tensor:
        seen.clear()
        policy = policy_of(tokenizer, world, fraction=1.0, max_new_tokens=5)
        policy(3, [given(policy, [True, True])] * micro_batches)
        return torch.stack(seen)  # [micro-batches, rows, tokens]

    whole = numbers(World(0, 1, 0, CPU), 4).flatten(0, 1)
    of_two = [numbers(World(rank, 2, rank, CPU), 2) for rank in (0, 1)]
    assert torch.equal(torch.stack(of_two, 1).flatten(0, 2), whole)
    assert len(whole.unique()) == whole.numel() == 40 and 0 <= whole.min() and whole.max() < 1


def test_a_twin_speaks_with_the_weights_of_the_moment(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = language_model("Llama", 3, tie_word_embeddings=True).train()
    twin = Twin(model)
    hooks: list[Any] = []
    # As those of an engine, which come later.
    for module in model.modules():
        module.register_forward_hook(lambda *given: hooks.append(given))

    def said() -> list[list[int]]:
        with twin.opened() as speaker:
            assert not speaker.training and not any(p.requires_grad for p in speaker.parameters())
            return generate(speaker, [[2, 5, 6], [2, 7]], tokenizer, CPU, 6, 16)

    before = said()
    model.eval()
    assert before == generate(model, [[2, 5, 6], [2, 7]], tokenizer, CPU, 6, 16) and hooks
    model.train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    hooks.clear()
    assert said() != before and not hooks
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.numel() == 0 for p in twin.twin.parameters())
    assert isinstance(model, nn.Module) and all(p.grad is None for p in model.parameters())


def write_pairs(path: Path, rows: int, seed: int) -> str:
    """Prompts and answers of one to many words; of few words, so that random answers have some."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            question, answer = (draw.choices(WORDS, k=draw.choice([1, 2, 5, 12])) for _ in "qa")
            file.write(json.dumps({"q": " ".join(question), "a": " ".join(answer)}) + "\n")
    return str(path)


POLICY = {"fraction": 0.6, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 12}
LEVELS: dict[str, dict] = {
    "soft_labels": {"kind": "jsd"},
    "hidden_mse": {},
    "sample_relation": {"of": "last"},
}


def config_at(base: Path, name: str, teacher: Path, policy: dict | None, zero: int = 0) -> dict:
    """Five steps of 4 of 17 pairs, of which the last has one; 7 are held out."""
    (base / name).mkdir()
    data = {part: str(base / f"{part}.jsonl") for part in ("train", "validation")}
    stage: dict[str, Any] = {"name": "all", "steps": 5, "losses": LEVELS}
    config = run_config(base / name, teacher, data, "causal_lm", stages=[stage])
    if policy is not None:
        stage["on_policy"] = policy
    config["data"] |= {"prompt": "q", "completion": "a", "max_length": 32}
    config["data"]["cache"] = str(base / "cache")
    config["task"]["generate"] = {"rows": 6, "max_new_tokens": 10}
    config["run"] |= {"seed": 3, "checkpoint_minutes": None}
    config["batch"] |= {"micro_batch": 2, "evaluation": 2}
    config["student"]["zero_stage"], config["teacher"]["zero_stage"] = zero, zero
    return config


def folder(config: dict) -> Path:
    return Path(config["run"]["dir"])


def rows(config: dict) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in logged(config)]


def distilled(configs: dict[str, dict], base: Path, world: int, killed: str = "") -> None:
    """Each, and the one named `killed` twice: before step 3 it ends."""
    words = []
    for name, config in configs.items():
        path = base / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        words += [f"{path}@3", str(path)] if name == killed else [str(path)]
    start("interrupted_runs.py", words, base, world)
    said = {name: json.loads((base / f"{name}.said").read_text()) for name in configs}
    assert all(each == ["done", ""] for each in said.values()), said


def model_at(path: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def prompts_of(config: dict, part: str, lines: list[int]) -> Iterator[tuple[list[int], str]]:
    """[CLS] and the words of a question, and its answer."""
    tokenizer = AutoTokenizer.from_pretrained(config["teacher"]["path"])
    found = Path(config["data"][part]).read_text().splitlines()
    for row in (json.loads(found[line]) for line in lines):
        yield [2, *tokenizer(row["q"], add_special_tokens=False)["input_ids"]], row["a"]


def logits_along(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Those that say the tokens of the answer, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits
    return logits[0, len(prompt) - 1 : -1].double()


def drawn_by_hand(model: Any, prompt: list[int], numbers: list[float], room: int) -> list[int]:
    """Token by token from softmax(logits / 0.8), without what lies beyond 0.95 of it."""
    said: list[int] = []
    while len(said) < room and not (said and said[-1] == model.generation_config.eos_token_id):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + said])).logits[0, -1]
        probabilities = (logits / 0.8).softmax(-1)
        most_likely, order = probabilities.sort(descending=True)
        within = order[most_likely.cumsum(0) - most_likely < 0.95]
        kept = torch.zeros_like(probabilities).index_copy(0, within, probabilities[within])
        reached = (kept / kept.sum()).double().cumsum(0)
        said.append(int((reached <= numbers[len(said)]).sum()))
    return said


def rouge_by_hand(config: dict, path: Any) -> float:
    """Of six held-out prompts, each alone, with the model as it lies on disk."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), model_at(path)
    said, meant = [], []
    for prompt, answer in prompts_of(config, "validation", [*range(6)]):
        tokens = by_hand(model, prompt, [model.generation_config.eos_token_id], 10)
        said.append(tokenizer.decode(tokens, skip_special_tokens=True))
        meant.append(answer)
    return rouge_l(said, meant)["rougeL"]


def check_report(config: dict) -> None:
    report = json.loads((folder(config) / "report.json").read_text())
    assert report["answered_rows"] == 6
    paths = {
        "teacher": config["teacher"]["path"],
        "student_before": folder(config) / "student",
        "student": folder(config) / "export",
    }
    for name, path in paths.items():
        found = report[name]["quality"]["rougeL"]
        assert found == pytest.approx(rouge_by_hand(config, path), abs=1e-6), name


def test_a_step_by_hand(tmp_path: Path, teachers: dict) -> None:
    """At ZeRO 3: the answers that the student draws, the divergence along them and from nowhere
    else, and the report on what all models say."""
    write_pairs(tmp_path / "train.jsonl", 17, 0)
    write_pairs(tmp_path / "validation.jsonl", 7, 1)
    config = config_at(tmp_path, "alone", teachers["causal_lm"], POLICY | {"fraction": 1.0}, 3)
    config["stages"][0] |= {"steps": 1, "losses": {"soft_labels": {}}}
    config["batch"]["grad_accum"] = 2
    distilled({"by hand": config}, tmp_path, 1)
    student, teacher = (
        model_at(path) for path in (folder(config) / "student", config["teacher"]["path"])
    )
    batch = sum(Sampler(17, 2, 2, 0, 1, seed=3).step(0), [])
    losses, lengths = [], []
    for slot, (prompt, _) in enumerate(prompts_of(config, "train", batch)):
        numbers = np.random.default_rng([0x0B, 3, 0, slot]).random(12)
        answer = drawn_by_hand(student, prompt, numbers.tolist(), min(12, 32 - len(prompt)))
        p, q = (logits_along(m, prompt, answer).log_softmax(-1) for m in (teacher, student))
        losses.append((p.exp() * (p - q)).sum(-1))
        lengths.append(len(answer))
    (row,) = rows(config)
    assert row["on_policy/share"] == 1 and row["on_policy/length"] == sum(lengths) / 4
    expected = torch.cat(losses).mean().item()
    assert expected > 0.01 and row["loss/soft_labels"] == pytest.approx(expected, rel=1e-4)
    check_report(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, teachers: dict) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("on_policy")
    write_pairs(base / "train.jsonl", 17, 0)
    write_pairs(base / "validation.jsonl", 7, 1)
    llama = teachers["causal_lm"]
    names = ("zero0", "whole", "killed", "zero1", "zero2", "bf16")
    found = {name: config_at(base, name, llama, POLICY) for name in names}
    for zero, name in enumerate(("zero1", "zero2", "bf16"), 1):
        found[name]["student"]["zero_stage"] = min(zero, 2)
        found[name]["batch"] |= {"micro_batch": 1, "grad_accum": 2}
    found["bf16"]["student"]["dtype"] = found["bf16"]["teacher"]["dtype"] = "bf16"
    for name in ("whole", "killed"):
        config = found[name]
        config["student"]["zero_stage"] = config["teacher"]["zero_stage"] = 3
        # Small weights would stay whole between uses, as those of real models do not.
        threshold = {"stage3_param_persistence_threshold": 0}
        config["deepspeed"] = {"zero_optimization": threshold}
        config["batch"] |= {"micro_batch": 1, "grad_accum": 2}
        config["run"]["checkpoint_every"], config["log_every"] = 2, 3
    found["teacher"] = config_at(
        base,
        "teacher",
        llama,
        {"by": "teacher", "fraction": 1.0, "temperature": 0, "max_new_tokens": 20},
        3,
    )
    found["teacher"]["student"]["zero_stage"] = 2
    found["teacher"]["stages"][0] |= {"losses": {"hard_labels": {}}, "steps": 2}
    distilled(found, base, 2, killed="killed")
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(runs: dict) -> None:
    whole, killed = runs["whole"], runs["killed"]
    assert rows(whole) == rows(killed)
    # Steps 0 to 2 and 3 to 4: the kill falls between what is counted together.
    assert [row["step"] for row in rows(whole)] == [2, 4]
    ours, theirs = (model_at(folder(config) / "export").state_dict() for config in (whole, killed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_layouts_and_stages_learn_from_the_same_answers(
    runs: dict, tmp_path: Path, teachers: dict
) -> None:
    """Two processes at ZeRO 0, and one, with one micro-batch; two at ZeRO 3 with two."""
    base = folder(runs["zero0"]).parent.parent
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").symlink_to(base / f"{part}.jsonl")
    alone = config_at(tmp_path, "alone", teachers["causal_lm"], POLICY)
    alone["batch"]["micro_batch"] = 4
    distilled({"alone": alone}, tmp_path, 1)
    ours, reference = rows(alone), rows(runs["zero0"])
    shares = [row["on_policy/share"] for row in reference]
    # The last step has rows that only fill it.
    assert set(shares) == {0, 1} and shares[4] == 1
    found = {"alone": ours} | {name: rows(runs[name]) for name in ("zero1", "zero2")}
    check_parity(found, reference)
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.get("on_policy/length") == theirs.get("on_policy/length")
    first, second = rows(runs["whole"])
    assert first["on_policy/share"] == sum(shares[:3]) / 3
    assert second["on_policy/share"] == sum(shares[3:]) / 2
    for name in ("loss/total", *(f"loss/{name}" for name in LEVELS)):
        mean = sum(row[name] for row in reference[:3]) / 3
        assert first[name] == pytest.approx(mean, rel=1e-4), name


@pytest.mark.slow
def test_models_in_16_bit_learn_from_their_own_answers(runs: dict) -> None:
    """The same steps, with answers that rounding may have changed."""
    ours, reference = rows(runs["bf16"]), rows(runs["zero0"])
    assert len(ours) == len(reference)
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine["on_policy/share"] == theirs["on_policy/share"]
        assert mine.get("on_policy/length", 1) >= 1
        assert mine["loss/total"] == pytest.approx(theirs["loss/total"], rel=0.5)
        assert mine["grad_norm"] > 0 and not mine.get("skipped")


@pytest.mark.slow
def test_the_answers_of_several_processes_are_measured(runs: dict) -> None:
    """Six rows are two steps of two rows of two processes; the last has none for the second."""
    check_report(runs["whole"])


@pytest.mark.slow
def test_a_teacher_s_answers_are_learned_as_labels(runs: dict) -> None:
    """Greedy ones, from a teacher that lies in parts; against them made by hand."""
    config = runs["teacher"]
    student, teacher = (
        model_at(path) for path in (folder(config) / "student", config["teacher"]["path"])
    )
    losses, lengths = [], []
    batch = Sampler(17, 4, 1, 0, 1, seed=3).step(0)[0]
    for prompt, _ in prompts_of(config, "train", batch):
        ends = [teacher.generation_config.eos_token_id]
        answer = by_hand(teacher, prompt, ends, min(20, 32 - len(prompt)))
        logits = logits_along(student, prompt, answer)
        losses.append(cross_entropy(logits, torch.tensor(answer), reduction="none"))
        lengths.append(len(answer))
    first = rows(config)[0]
    assert first["on_policy/share"] == 1 and first["on_policy/length"] == sum(lengths) / 4
    expected = torch.cat(losses).mean().item()
    assert first["loss/hard_labels"] == pytest.approx(expected, rel=1e-4)
