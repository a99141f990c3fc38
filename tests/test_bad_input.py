"""Mistakes that only data and models can tell: one sentence each, and no run folder is touched."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BERT, ROOT, WORDS, run_config, write_model, write_tokenizer

from mlkd_dist import run
from mlkd_dist.config import HEADER, from_mapping, load

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # What is refused for want of a GPU is refused on any machine.
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
}


def write_rows(path: Path, rows: list[Any]) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


GOOD = [{"text": f"w{i} w{i + 1}", "label": i % 3} for i in range(8)]

ASKS = {"role": "user", "content": "w0"}

# Case -> the rows of its training file.
ROWS = {
    "no rows": [],
    "not JSON": [*GOOD[:2], '{"text": "w1", "label"', *GOOD[2:]],
    "no such column": [{"texts": "w1", "label": 0}] * 3,
    "label outside": [*GOOD, {"text": "w1", "label": 3}],
    "label a name": [{"text": "w1", "label": "good"}, {"text": "w2", "label": "bad"}],
    "label a fraction": [{"text": "w1", "label": 0.5}, {"text": "w2", "label": 0.5}],
    "an empty completion": [{"text": "w1", "answer": "w2"}, {"text": "w3", "answer": " "}],
    "a prompt of the whole window": [{"text": "w1 " * 50, "answer": f"w{i}"} for i in range(3)],
    "no chat template": [
        {"chat": [ASKS, {"role": "assistant", "content": f"w{i}"}]} for i in range(3)
    ],
    "too many bad rows": [*GOOD, '{"text": "w1", "label"', GOOD[0] | {"text": " "}, "null"],
}

# Case -> pieces that its sentence must hold.
SAID = {
    "other tokenizer": ["teacher", "student", "different tokenizers", "'w0'", "'other'", "use a"],
    "no rows": ["no rows.jsonl", "is empty"],
    "not JSON": ["not JSON.jsonl', line 3: it is not JSON", "one JSON object per line", "max_bad"],
    "a class of validation alone": [
        "label 5 of the validation",
        "3 classes (0 to 2)",
        "task.labels",
    ],
    "too many bad rows": [
        "data.train: 3 of the 11 rows of ",
        "more than data.max_bad allows (2)",
        "line 9: it is not JSON",
        "line 10: column 'text' is empty",
        "quarantine-",
    ],
    "no such column": ["'text'", "did you mean 'texts'?", "data.text"],
    "label outside": ["label outside.jsonl', line 9: label 3", "3 classes", "0 to 2", "max_bad"],
    "label a name": ["'label'", "'good'", "labels are 0, 1, 2", "data.label"],
    "label a fraction": ["'label'", "0.5", "labels are 0, 1, 2"],
    "an empty completion": ["line 2: column 'answer' is empty", "remove the row"],
    "a prompt of the whole window": [
        "line 1: ",
        "'text'",
        "has 51 tokens",
        "data.max_length is 48",
        "raise",
    ],
    "no chat template": ["data.messages", "no chat template", "data.prompt and data.completion"],
    "an encoder as decoder": ["BertLMHeadModel", "tokens that come later", "use a decoder"],
    "more tokens than entries": ["40 entries", "45 tokens", "resized"],
    "fewer entries, no head over them": ["40 entries", "45 tokens", "resized"],
    "positions from another padding": ["padding token 1 on", "pads with 0", "must be 0"],
    "too long from its padding on": ["data.max_length: 64", "63 tokens", "use 63 or less"],
    "no such file": ["absent.jsonl", "no such file"],
    "no head": ["no weights for classifier.bias", "2 missing", "teacher.finetune"],
    "broken weights": ["cut short", "cannot be loaded"],
    "pickled weights": ["pickled' cannot be loaded", "may run code", "safetensors"],
    "too long": ["data.max_length: 65", "64 tokens", "use 64 or less"],
    "answers too long": [
        "stages[0].on_policy.max_new_tokens: 64 tokens after prompts of up to data.max_length (48)",
        "the 64 that",
        "lower one",
    ],
    "other classes": ["3 classes", "2", "same task", "student.from_teacher"],
    "regression with classes": ["three' has 3 classes", "regression needs one", "teacher.finetune"],
    "a head that nobody trains": ["student.path", "no head for the task", "soft_labels or hard"],
    "an opening too short": ["stages[0].open: 2 steps", "too few for 2 layers", "more steps"],
    "maps of a window": ["data.max_length: 48", "16 tokens", "attention_kl", "16 or less"],
    "other class count": ["task.labels: 5", "3 classes", "remove it"],
    "head of another size": ["classifier", "3", "2", "task.labels"],
    "no mask token": ["no mask token", "masked_lm"],
    "validation is train": ["data.validation is the training data", "data.validation_fraction"],
    "no attention interface": ["ConvBertModel", "attention interface", "use a BERT"],
    "no such head for this type": ["AutoModelForMaskedLM", "'gpt2'", "masked_lm"],
    "no type known": ["its config cannot be read", "novel"],
    "cannot be cut": ["student.from_teacher.hidden", "cannot be narrowed", "leave hidden empty"],
    "too little kept": ["student.low_rank.keep: 0.01", "no rank at all", "or more"],
    "half of a joined matrix": ["student.low_rank.matrices", "in one matrix (attn.c_attn)", "all"],
    "embeddings tied to the head": ["low_rank.embeddings", "BertForMaskedLM shares", "use false"],
    "no such matrix": ["module_mse.of", "BertForSequenceClassification has no matrix gate"],
    "matrices of other sizes": ["module_mse: up maps 48 to 64", "48 to 32", "same sizes"],
    "an earlier run": ["run.dir", "holds an earlier run", "run.overwrite=true"],
    "an earlier run with code": ["run.dir", "config.yaml cannot be read", "choose another folder"],
    "files of others": ["run.dir", "holds files that are no run", "choose another folder"],
    "own file in a run": ["run.dir", "holds files that are no run", "choose another folder"],
    "a config that no run wrote": ["run.dir", "holds files that are no run"],
    "a file as folder": ["run.dir", "run' is a file or", "choose another folder"],
    "below a file": ["run.dir", "good.jsonl' is a file or write-protected", "choose another"],
    "no flash attention": ["attention: flash_attention_2", "flash-attn"],
    "no triton": ["kernels:", "triton"],
    "a deepspeed key misspelt": [
        "deepspeed.prescale_gradient",
        "did you mean 'prescale_gradients'",
    ],
    "a zero key misspelt": ["deepspeed:", "overlap_com ", "not permitted"],
    "a teacher in the making": ["run.dir", "-teacher", "holds files that are no run"],
    "labels refused after finetune is planned": ["label outside.jsonl', line 9: label 3"],
}


def write_models(folder: Path) -> dict[str, Path]:
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        BertConfig,
        ConvBertConfig,
        GPT2Config,
        MistralConfig,
        RobertaConfig,
    )

    bert = BertConfig(**BERT, num_labels=3)
    two = BertConfig(**BERT, num_labels=2)
    slim = BertConfig(**BERT | {"intermediate_size": 32}, num_labels=3)
    convbert = ConvBertConfig(**BERT, embedding_size=48)
    gpt = dict(n_embd=48, n_layer=4, n_head=4, n_positions=64, num_labels=3, pad_token_id=0)
    gpt2, narrow = (GPT2Config(vocab_size=size, **gpt) for size in (64, 40))
    classifier = AutoModelForSequenceClassification
    mistral = MistralConfig(**BERT, num_key_value_heads=2, sliding_window=16)
    made = {
        "three": write_model(folder / "three", bert, classifier),
        "two": write_model(folder / "two", two, classifier),
        "slim": write_model(folder / "slim", slim, classifier),
        "base": write_model(folder / "base", bert, AutoModel),
        "words": write_model(folder / "words", bert, classifier, words=["other", *WORDS[1:]]),
        "convbert": write_model(folder / "convbert", convbert, AutoModel),
        "few": write_model(folder / "few", BertConfig(**BERT | {"vocab_size": 40}), AutoModel),
        "roberta": write_model(
            folder / "roberta", RobertaConfig(**BERT, pad_token_id=0), AutoModel
        ),
        "padded": write_model(folder / "padded", RobertaConfig(**BERT, pad_token_id=1), AutoModel),
        "mistral": write_model(folder / "mistral", mistral, AutoModel),
        "gpt2": write_model(folder / "gpt2", gpt2, classifier),
        "decoder": write_model(folder / "decoder", gpt2, AutoModelForCausalLM),
        "narrow": write_model(folder / "narrow", narrow, AutoModelForCausalLM),
        "maskless": write_model(folder / "maskless", bert, AutoModelForMaskedLM),
    }
    settings = made["maskless"] / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k != "mask_token"}
    settings.write_text(json.dumps(kept))
    cut = made["cut short"] = folder / "cut short"
    shutil.copytree(made["three"], cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    pickled = made["pickled"] = Path(shutil.copytree(made["three"], folder / "pickled"))
    (pickled / "model.safetensors").unlink()
    # Of a type that nothing which reads weights has to know.
    torch.save({"weight": Fraction(1, 2)}, pickled / "pytorch_model.bin")
    novel = made["novel"] = folder / "novel"
    write_tokenizer(novel)
    (novel / "config.json").write_text('{"model_type": "novel"}')
    return made


def earlier_run(folder: Path) -> None:
    (folder / "export").mkdir(parents=True)
    (folder / "config.yaml").write_text(HEADER)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "export" / "model.safetensors").write_text("trained for a week")


def all_configs(base: Path) -> dict[str, dict]:
    """Case -> its config; nearly all would replace an earlier run that is already there."""
    models = write_models(base / "models")
    data = {"train": write_rows(base / "good.jsonl", GOOD), "validation_fraction": 0.3}

    def config(
        case: str, teacher: str = "three", task: str = "classification", **more: Any
    ) -> dict:
        folder = base / case
        folder.mkdir()
        rows = {"train": write_rows(folder / f"{case}.jsonl", ROWS[case])} if case in ROWS else {}
        found = run_config(folder, models[teacher], data | rows, task, **more)
        if task == "masked_lm":
            found["stages"][0]["losses"] = {"hidden_mse": {}}
        if task == "causal_lm":
            found["stages"][0]["losses"] = {"hard_labels": {}, "soft_labels": {}}
            found["student"]["from_teacher"] = {"layers": 2}
        earlier_run(folder / "run")
        found["run"]["overwrite"] = True
        return found

    def student(name: str) -> dict:
        return {"path": str(models[name]), "zero_stage": 0}

    answers = {"data__prompt": "text", "data__completion": "answer"}
    columns = dict.fromkeys(("an empty completion", "a prompt of the whole window"), answers)
    columns["no chat template"] = {"data__messages": "chat"}
    given = {"too many bad rows": {"data__max_bad": 2}}
    configs = {case: config(case, **given.get(case, {})) for case in ROWS if case not in columns}
    configs |= {
        case: config(case, "decoder", "causal_lm", **given) for case, given in columns.items()
    }
    configs |= {
        "an encoder as decoder": config("an encoder as decoder", "maskless", "causal_lm"),
        "more tokens than entries": config("more tokens than entries", "narrow", "causal_lm"),
        "fewer entries, no head over them": config(
            "fewer entries, no head over them", "base", "embedding", student=student("few")
        ),
        "positions from another padding": config(
            "positions from another padding", "base", "embedding", student=student("padded")
        ),
        "too long from its padding on": config(
            "too long from its padding on",
            "base",
            "embedding",
            student=student("roberta"),
            data__max_length=64,
        ),
        "other tokenizer": config("other tokenizer", student=student("words")),
        "no such file": config("no such file", data__train=str(base / "absent.jsonl")),
        "no head": config("no head", teacher="base"),
        "broken weights": config("broken weights", teacher="cut short"),
        "pickled weights": config("pickled weights", teacher="pickled"),
        "too long": config("too long", data__max_length=65),
        "answers too long": config(
            "answers too long",
            "decoder",
            "causal_lm",
            data__prompt="text",
            data__completion="text_too",
        ),
        "other classes": config("other classes", student=student("two")),
        "regression with classes": config("regression with classes", task="regression"),
        "a head that nobody trains": config("a head that nobody trains", student=student("base")),
        "an opening too short": config("an opening too short"),
        "maps of a window": config("maps of a window", "mistral", "embedding"),
        "other class count": config("other class count", task__labels=5),
        "a class of validation alone": config(
            "a class of validation alone",
            student=student("three"),
            data__validation=write_rows(base / "five.jsonl", [{"text": "w1", "label": 5}]),
        ),
        "head of another size": config("head of another size", student=student("two")),
        "no mask token": config("no mask token", "maskless", "masked_lm"),
        "validation is train": config("validation is train", data__validation=data["train"]),
        "no attention interface": config("no attention interface", "convbert", "embedding"),
        "no such head for this type": config("no such head for this type", "gpt2", "masked_lm"),
        "no type known": config("no type known", "novel"),
        "cannot be cut": config("cannot be cut", "gpt2"),
        "an earlier run": config("an earlier run", run__overwrite=False),
        "an earlier run with code": config("an earlier run with code", run__overwrite=False),
        "files of others": config("files of others"),
        "own file in a run": config("own file in a run"),
        "a config that no run wrote": config("a config that no run wrote"),
        "a file as folder": config("a file as folder"),
        "below a file": config("below a file"),
        "no flash attention": config("no flash attention", teacher__attention="flash_attention_2"),
        "no triton": config("no triton"),
        "a deepspeed key misspelt": config("a deepspeed key misspelt"),
        "a zero key misspelt": config("a zero key misspelt"),
        "too little kept": config("too little kept"),
        "half of a joined matrix": config("half of a joined matrix", "gpt2"),
        "embeddings tied to the head": config(
            "embeddings tied to the head", "maskless", "masked_lm"
        ),
        "no such matrix": config("no such matrix"),
        "matrices of other sizes": config("matrices of other sizes"),
        "a teacher in the making": config("a teacher in the making", "base"),
        "labels refused after finetune is planned": config(
            "labels refused after finetune is planned", "base"
        ),
    }
    for case in ("an earlier run", "an earlier run with code"):
        configs[case]["run"]["overwrite"] = False
    written = base / "an earlier run with code" / "run" / "config.yaml"
    written.write_text(f"{HEADER}run: !!python/object/apply:os.getpid []\n")
    configs["no triton"]["kernels"] = "triton"
    configs["answers too long"]["stages"][0] |= {"losses": {"soft_labels": {}}, "on_policy": {}}
    configs["a deepspeed key misspelt"]["deepspeed"] = {"prescale_gradient": True}
    configs["a zero key misspelt"]["deepspeed"] = {"zero_optimization": {"overlap_com": True}}
    low_rank = {"from_teacher": {"layers": 2}, "low_rank": {"keep": 0.01}}
    configs["too little kept"]["student"] = low_rank
    configs["half of a joined matrix"]["student"] = {"low_rank": {"matrices": ["query", "up"]}}
    configs["embeddings tied to the head"]["student"] = {"low_rank": {"embeddings": True}}
    for case, options in (("no such matrix", {"of": ["gate"]}), ("matrices of other sizes", {})):
        configs[case]["stages"] = [{"steps": 1, "losses": {"module_mse": options}}]
    for case in ("too little kept", "half of a joined matrix"):
        configs[case]["stages"] = [{"steps": 1, "losses": {"soft_labels": {}}}]
    configs["no such matrix"]["student"] = {"low_rank": {}}
    configs["matrices of other sizes"]["student"] = student("slim")
    of_one_loss = {"teacher": {}, "stages": [{"steps": 1, "losses": {"hard_labels": {}}}]}
    configs["head of another size"] |= of_one_loss
    configs["a class of validation alone"] |= of_one_loss
    hidden_only = {"steps": 1, "losses": {"hidden_mse": {}}}
    configs["a head that nobody trains"]["stages"] = [hidden_only]
    two_steps = {"steps": 2, "losses": {"hidden_mse": {}, "soft_labels": {}}}
    configs["an opening too short"]["stages"] = [two_steps | {"open": {"rule": "sid"}}]
    maps = {"steps": 1, "losses": {"attention_kl": {}}}
    configs["maps of a window"] |= {"stages": [maps], "student": student("mistral")}
    embeddings = {"steps": 1, "losses": {"sample_relation": {}}}
    configs["no attention interface"] |= {"stages": [embeddings], "student": student("convbert")}
    configs["cannot be cut"]["stages"] = [{"steps": 1, "losses": {"soft_labels": {}}}]
    others = base / "files of others" / "run"
    shutil.rmtree(others)
    others.mkdir()
    (others / "thesis.tex").write_text("all of it")
    (base / "own file in a run" / "run" / "notes.txt").write_text("what I saw")
    (base / "a config that no run wrote" / "run" / "config.yaml").write_text("run: {}\n")
    blocked = base / "a file as folder" / "run"
    shutil.rmtree(blocked)
    blocked.write_text("a file")
    configs["below a file"]["run"]["dir"] = str(base / "good.jsonl" / "run")
    for case in ("a teacher in the making", "labels refused after finetune is planned"):
        configs[case]["teacher"]["finetune"] = {"steps": 1}
    teacher = base / "a teacher in the making" / "run-teacher"
    teacher.mkdir()
    (teacher / "thesis.tex").write_text("all of it")
    last = configs["labels refused after finetune is planned"]
    last["data"]["train"] = configs["label outside"]["data"]["train"]
    last["task"]["labels"] = 3
    return configs


def contents(folder: Path) -> dict[str, bytes]:
    """All files, but for the cache of tokenised data."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes() for name, path in files.items() if name.parts[0] != "cache"
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list, bool]]:
    return run_all(tmp_path_factory.mktemp("refused"))


def run_all(base: Path) -> Callable[[str], tuple[list, bool]]:
    """Case -> [kind of error, message], and whether all its files are as they were."""
    configs = all_configs(base)
    paths = {case: base / f"{case}.yaml" for case in configs}
    for case, config in configs.items():
        paths[case].write_text(yaml.safe_dump(config))
    before = {case: contents(base / case) for case in configs}
    command = [sys.executable, str(ROOT / "tests" / "refused_runs.py"), str(base / "said.json")]
    subprocess.run(
        [*command, *map(str, paths.values())], env=os.environ | ENVIRONMENT, check=True, timeout=900
    )
    said = json.loads((base / "said.json").read_text())
    return lambda case: (said[str(paths[case])], contents(base / case) == before[case])


@pytest.mark.parametrize("case", SAID)
def test_one_sentence_and_nothing_touched(refused: Callable, case: str) -> None:
    (kind, message), untouched = refused(case)
    assert kind == "UserError", message
    assert "\n" not in message
    assert [piece for piece in SAID[case] if piece not in message] == [], message
    assert untouched


def test_every_case_is_expected() -> None:
    assert ROWS.keys() <= SAID.keys()


def test_an_earlier_run_is_replaced_whole(
    tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "on_first", lambda world, work: work())
    given = run_config(tmp_path, teachers["classification"], {"train": "builtin:python_docs"})
    given["run"]["overwrite"] = True
    config = from_mapping(given)
    earlier_run(tmp_path / "run")
    assert run.make_folder(config, None) == str(tmp_path / "run" / "student")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "student"]
    assert load(tmp_path / "run" / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_two_processes_say_it_once_and_end(tmp_path: Path, teachers: dict[str, Path]) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS["not JSON"])
    config = run_config(tmp_path, teachers["classification"], {"train": train})
    config["launch"] = {"processes": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mlkd_dist.cli", "distill", str(tmp_path / "run.yaml")]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert output.count("line 3: it is not JSON") == 1, output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
