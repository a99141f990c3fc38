"""What a cache of a teacher costs and loses, for the table in README.md: bytes per token, and the
error of soft_labels and of its gradient by the student's logits against the live teacher.

    python tests/cache_error.py [STEPS]      default 300

The teacher is the untrained Llama of configs/small_llama.py (4 layers, 2048 entries) after STEPS
steps on the real text that every Python carries; the student is the same model after a third of
them, so that they differ as a student in training does. Both are seen on text that neither read.
"""

import sys

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, "configs")

from small_llama import tokenizer, untrained

from mlkd_dist.inputs.builtin_text import passages
from mlkd_dist.losses.soft_labels import over_vocabulary
from mlkd_dist.models.head import HeadRows, top_k_rows

LENGTH, BATCH, HELD_OUT = 128, 8, 4
TOP_K, TEMPERATURES = (16, 64, 256), (1.0, 2.0)


def blocks(words: PreTrainedTokenizerFast) -> Tensor:  # [n, L]
    ids = [i for text in passages() for i in [*words(text)["input_ids"], words.eos_token_id]]
    whole = len(ids) // LENGTH * LENGTH
    order = torch.randperm(whole // LENGTH, generator=torch.Generator().manual_seed(0))
    return torch.tensor(ids[:whole]).view(-1, LENGTH)[order]


def train(model: LlamaForCausalLM, rows: Tensor, first: int, last: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(first, last):
        ids = rows[step * BATCH : (step + 1) * BATCH]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"step {last}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:  # [N, V]
    return model(input_ids=ids).logits.flatten(0, 1).double()


def loss_and_gradient(
    student: Tensor, teacher: object, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits stand for hidden states under a head of ones and zeros."""
    rows = student.clone().requires_grad_()
    weight = torch.ones(len(rows), dtype=rows.dtype) / len(rows)
    head = HeadRows(rows, torch.eye(rows.shape[1], dtype=rows.dtype))
    loss = over_vocabulary(head, teacher, weight, None, temperature=temperature)
    return loss.detach(), torch.autograd.grad(loss, rows)[0]


def main(steps: int) -> None:
    rows, model = blocks(tokenizer(passages())), untrained()
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    train(model, rows, 0, steps // 3)
    student = logits(model, held_out)
    train(model, rows, steps // 3, steps)
    teacher = logits(model, held_out)
    print("| top_k | temperature | bytes per token | outside | loss | gradient |")
    for temperature in TEMPERATURES:
        live = HeadRows(teacher, torch.eye(teacher.shape[1], dtype=teacher.dtype))
        loss, gradient = loss_and_gradient(student, live, temperature)
        for k in (*TOP_K, teacher.shape[1]):
            kept = top_k_rows(teacher.float(), k, (temperature,))
            size = 4 * k + (4 if kept.rest is not None else 0)
            found, its = loss_and_gradient(student, kept, temperature)
            mass = (teacher / temperature).softmax(1).topk(k).values.sum(1)
            off = (found - loss) / loss, (its - gradient).norm() / gradient.norm()
            cells = k, f"{temperature:g}", size, f"{1 - mass.mean():.4f}"
            cells += f"{off[0]:+.2%}", f"{off[1]:.2%}"
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
