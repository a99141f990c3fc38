"""One file per loss: its name is the loss's key in a config and the function inside.

A loss reads traces and returns one number per row, fp32 (float64 where its inputs are), and nothing
else: which rows count, their weights, sums and averages are the objective's. Padding never changes
the value of a real row and never yields NaN. Constants say how it is called; the keyword-only
arguments, with literal defaults, are its options:

    ROWS        what one row is: "token", "sample" or "label"
    SCOPE       "trace": called with the Traces; "layer": with Layers, once per layer pair;
                "module": as "layer", and it reads the Layers' matrices;
                "batch": with the Samples of the global batch
    READS       what it reads, by the names of trace.py; with an option `of`, only what `of` names
    TEACHER     False: it reads no teacher and is called with the student's side only
    PROJECTION  True: the student's side may first pass a learned map to the teacher's width
    SAME_HEADS  True: it compares head with head, so both models must have as many; may be left out

    PACKED      True, and else left out: its rows read no other token of their sequence, so that it
                is right for several documents in one sequence (data.pack)

A loss of labels may have a second function `over_vocabulary` with the same options, for tasks with
a row of logits per token. These are never all made: it is called with the HeadRows of student and
teacher, the weight and the label of every row, and returns the weighted sum of its rows.

The constants and signatures are read without importing the file, so they are literals. `backend`,
where a loss has it, is filled from the run's `kernels`. A loss that has `row_weight` [B, L], and is
given it, returns the sum of weight times row, of which it averages the heads: a kernel that knows
the weights makes the gradient along with the value.
"""

import importlib
from collections.abc import Callable

from torch import Tensor


def load(name: str, function: str | None = None) -> Callable[..., Tensor]:
    """The function of the loss `name`, or another one of its file."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), function or name)
