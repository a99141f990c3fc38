"""Small real models, tokenizers and data, and runs of one or more processes."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
WORDS = [f"w{i}" for i in range(40)]
# Wider than the student (24) so that projections are needed; 4 layers so that a uniform map to 2
# skips some.
BERT = dict(
    vocab_size=64,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def made_tokenizer(folder: Path, template: str | None = None) -> Any:
    """One that was just written; with a template it has an end token and says chats."""
    from transformers import AutoTokenizer

    write_tokenizer(folder)
    found = AutoTokenizer.from_pretrained(folder)
    if template is not None:
        found.eos_token, found.chat_template = "[SEP]", template
    return found


def write_model(
    folder: Path, config: Any, model_class: Any, seed: int = 0, words: list[str] = WORDS
) -> Path:
    torch.manual_seed(seed)
    model = model_class.from_config(config)
    with torch.no_grad():
        # Initial weights are so small that all layers and heads look alike; trained ones differ.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    write_tokenizer(folder, words)
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One BERT per task, and a Llama with grouped keys and tied embeddings."""
    return write_teachers(tmp_path_factory.mktemp("teachers"))


def write_teachers(folder: Path) -> dict[str, Path]:
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        BertConfig,
        LlamaConfig,
    )

    classes = {
        "embedding": AutoModel,
        "classification": AutoModelForSequenceClassification,
        "regression": AutoModelForSequenceClassification,
        "question_answering": AutoModelForQuestionAnswering,
        "masked_lm": AutoModelForMaskedLM,
    }
    outputs = {"regression": 1, "question_answering": 2}
    models = {
        task: write_model(
            folder / task, BertConfig(**BERT, num_labels=outputs.get(task, 3)), model_class
        )
        for task, model_class in classes.items()
    }
    llama = LlamaConfig(**BERT, num_key_value_heads=2, tie_word_embeddings=True)
    models["causal_lm"] = write_model(folder / "causal_lm", llama, AutoModelForCausalLM)
    return models


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


def write_data(folder: Path) -> dict[str, str]:
    """Texts of 1 to 40 words, so that padding differs much; 17 rows are 4 global batches of 4 and
    one of 1."""
    draw = random.Random(0)

    def write(name: str, rows: int) -> str:
        path = folder / name
        with path.open("w") as file:
            for i in range(rows):
                words = draw.choices(WORDS, k=draw.choice([1, 2, 5, 40]))
                row = {"text": " ".join(words), "label": i % 3}
                # For pairs of texts, and for regression.
                row |= {"other": " ".join(words[:-4:-1]), "score": len(words) / 8 - i % 3}
                file.write(json.dumps(row) + "\n")
        return str(path)

    return {"train": write("train.jsonl", 17), "validation": write("validation.jsonl", 7)}


LOSSES = {
    "embedding_relation": {},
    "attention_relation": {"of": ["context", "query", "key", "value"], "splits": 2},
    "hidden_mse": {},
    "embedding_mse": {},
    "cls_cosine": {"of": "mean"},
    "sample_relation": {"of": "mean", "normalize": True, "temperature": 0.05},
    "sample_contrast": {"of": "mean"},
}
LOGIT_LOSSES = {"soft_labels": {"temperature": 2.0}, "hard_labels": {}}
# The embeddings of a Llama pass no norm and are small.
DECODER_LOSSES = {
    "embedding_relation": {"student_scale": 20.0, "teacher_scale": 20.0},
    "soft_labels": {"kind": "jsd", "temperature": 2.0},
}


def run_config(
    folder: Path, teacher: Path, data: dict[str, str], task: str = "classification", **changes: Any
) -> dict:
    """A run of five steps with every loss on, on the CPU, in fp32 without dropout."""
    losses = LOSSES | ({} if task == "embedding" else LOGIT_LOSSES)
    losses |= DECODER_LOSSES if task == "causal_lm" else {}
    base: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(teacher), "dtype": "fp32", "zero_stage": 0},
        "student": {
            "from_teacher": {"layers": 2, "heads": 2, "hidden": 24},
            "zero_stage": 0,
            "dropout": False,
        },
        "task": {"kind": task},
        "data": {**data, "max_length": 48, "cache": str(folder / "cache")},
        "stages": [{"name": "all", "steps": 5, "losses": losses}],
        "optim": {"lr": 1e-2, "warmup": 0},
        "batch": {"micro_batch": 4, "grad_accum": 1, "evaluation": 4},
        "log_every": 1,
    }
    for key, value in changes.items():
        block, _, name = key.partition("__")
        if name:
            base[block] = {**base[block], name: value}
        else:
            base[block] = value
    return base


def stored_config(
    folder: Path,
    teacher: Path,
    data: dict,
    task: str,
    top_k: int | None = None,
    states: dict | None = None,
    **changes: Any,
) -> dict:
    """Three steps that read the teacher's logits from a cache, and what the losses in `states` read
    beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = run_config(folder, teacher, data, task, **changes)
    losses = LOGIT_LOSSES | (states or {})
    found["stages"] = [{"name": "one", "steps": 3, "losses": losses}]
    found["teacher"]["cache"] = {"dir": str(folder / "stored"), "top_k": top_k}
    return found


def launch(configs: list[dict], folder: Path, world: int = 1) -> None:
    """Run the configs one after the other in `world` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, config in enumerate(configs):
        paths.append(folder / f"{i}.yaml")
        paths[-1].write_text(yaml.safe_dump(config))
    start("many_runs.py", [*map(str, paths)], folder, world)


def start(
    program: str,
    words: list[str],
    folder: Path,
    world: int = 1,
    per_node: int | None = None,
    limit: float = 1500,
) -> None:
    """A program of this folder in `world` processes, which may believe to be on several nodes; the
    output is shown where one fails, or takes more seconds than the limit."""
    from mlkd_dist.processes.network import free_port

    shared = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    processes = []
    for rank in range(world):
        local = rank % (per_node or world)
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(local)}
        command = [sys.executable, str(ROOT / "tests" / program), *words]
        log = (folder / f"rank{rank}.log").open("w")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=limit) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs


def logged(config: dict) -> list[dict]:
    lines = (Path(config["run"]["dir"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


Launch = Callable[..., None]


@contextmanager
def world_of_one() -> Iterator[Any]:
    """Joining one says so in the environment, which later tests must not see."""
    from mlkd_dist import engine

    before = dict(os.environ)
    try:
        yield engine.start()
    finally:
        engine.stop()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    with world_of_one():
        yield


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable]:
    """Calls a function, or `each` of many cases, in processes of their own: Triton chooses the
    interpreter when it is imported, which no other test must notice."""
    from interpreter import start_interpreter

    context = multiprocessing.get_context("spawn")
    workers = os.cpu_count()
    with ProcessPoolExecutor(workers, context, start_interpreter) as pool:

        def call(function: Callable, *args: Any, **kwargs: Any) -> None:
            pool.submit(function, *args, **kwargs).result()

        def call_each(function: Callable, cases: list[tuple]) -> None:
            for job in [pool.submit(function, *case) for case in cases]:
                job.result()

        call.each = call_each
        yield call
