"""One operation, its backends, and what PyTorch's compiler sees of it.

Compiled code sees an opaque operator with shapes and gradients: a trace into a loop over blocks
would unroll every block, and one into the launch of a kernel would break. Other code calls the
backends straight, which costs less than an operator. The eager definitions are traced.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mlkd_kernels.rows import weighted_sum


class Operation:
    """Calls the backend of a name with tensors and options; in compiled code torch.ops.mlkd.<name>.

    `schema` lists tensors and then options as PyTorch writes them; the first `leaves` may get
    gradients. `like` makes of the tensors and options what has the result's shape, type and device.
    The operator's backward pass runs the operation again, unless the result is a `scalar`: then its
    forward pass makes the gradient.
    """

    def __init__(
        self,
        name: str,
        backends: dict[str, Callable[..., Tensor]],
        schema: str,
        *,
        leaves: int,
        like: Callable[..., Tensor],
        scalar: bool = False,
    ):
        self.backends, self.leaves, self.like, self.scalar = backends, leaves, like, scalar
        arguments = [argument.split() for argument in schema.split(", ")]
        self.tensors = sum(kind.startswith("Tensor") for kind, _ in arguments)
        self.options = [word for _, word in arguments[self.tensors :]]
        # Which leaves get gradients: inside an operator nobody knows.
        given = f"{schema}, str backend, bool[] wanted"
        self.operator = define(name, self.forward, f"({given})", 1 + leaves if scalar else 1)
        self.operator.register_fake(self.fake)
        self.operator.register_autograd(self.backward, setup_context=self.save)
        if not scalar:
            self.gradient = define(
                f"{name}_backward", self.gradients, f"(Tensor grad, {given})", leaves
            )
            self.gradient.register_fake(self.fake_gradients)

    def __call__(self, backend: str, *tensors: Tensor | None, **options: Any) -> Tensor:
        if backend == "eager" or not torch.compiler.is_compiling():
            return self.backends[backend](*tensors, **options)
        leaves = tensors[: self.leaves]
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in leaves]
        ordered = [options[name] for name in self.options]
        made = self.operator(*tensors, *ordered, backend, wanted)
        return made[0] if self.scalar else made

    def value(self, args: Sequence[Any]) -> Tensor:
        tensors, (*options, backend) = args[: self.tensors], args[self.tensors :]
        named = dict(zip(self.options, options, strict=True))
        return self.backends[backend](*tensors, **named)

    def forward(self, *args: Any) -> Any:
        if not self.scalar:
            return self.value(args[:-1]).contiguous()
        value, found = self.differentiate(args, None)
        return value, *found

    def gradients(self, grad: Tensor, *args: Any) -> Any:
        return one_or_all(self.differentiate(args, grad)[1])

    def differentiate(
        self, args: Sequence[Any], grad: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The value and the gradients of the leaves, empty where they are not wanted."""
        *args, wanted = args
        with differentiable():
            for i, want in enumerate(wanted):
                args[i] = args[i].detach().requires_grad_(want)
            value = self.value(args)
            leaves = args[: self.leaves]
            asked = [x for x in leaves if x.requires_grad]
            made = iter(torch.autograd.grad(value, asked, grad) if asked else ())
        found = [next(made).contiguous() if x.requires_grad else x.new_empty(0) for x in leaves]
        return value.detach(), found

    def fake(self, *args: Any) -> Any:
        named = dict(zip(self.options, args[self.tensors : -2], strict=True))
        value = self.like(*args[: self.tensors], **named)
        return (value, *self.fake_found(args)) if self.scalar else value

    def fake_gradients(self, grad: Tensor, *args: Any) -> Any:
        return one_or_all(self.fake_found(args))

    def fake_found(self, args: Sequence[Any]) -> list[Tensor]:
        leaves = zip(args[: self.leaves], args[-1], strict=True)
        return [x.new_empty(x.shape if want else 0) for x, want in leaves]

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        saved = output[1:] if self.scalar else inputs[: self.tensors]
        ctx.save_for_backward(*saved)
        ctx.others, ctx.wanted = inputs[self.tensors :], inputs[-1]

    def backward(self, ctx: Any, grad: Tensor, *_: Any) -> Any:
        if self.scalar:
            found = [x * grad.to(x.dtype) for x in ctx.saved_tensors]
        else:
            found = self.gradient(grad, *ctx.saved_tensors, *ctx.others)
            found = [found] if self.leaves == 1 else found
        found = [x if want else None for x, want in zip(found, ctx.wanted, strict=True)]
        return *found, *[None] * (self.tensors - self.leaves + len(ctx.others))


def summed(rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a backend that gives rows, one that has their weights as a last tensor and gives the
    sum."""
    return lambda *tensors, **options: weighted_sum(rows(*tensors[:-1], **options), tensors[-1])


def weighing(rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same of a backend that sums by itself where it is given `row_weight`."""
    return lambda *tensors, **options: rows(*tensors[:-1], row_weight=tensors[-1], **options)


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Autograd inside an operator, which PyTorch runs below it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    below = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, below)


def define(name: str, function: Callable, given: str, results: int) -> Any:
    made = ", ".join(["Tensor"] * results)
    made = made if results == 1 else f"({made})"
    return torch.library.custom_op(
        f"mlkd::{name}", function, mutates_args=(), schema=f"{given} -> {made}"
    )


def one_or_all(found: list[Tensor]) -> Any:
    return found[0] if len(found) == 1 else tuple(found)


def not_traced(function: Callable) -> Callable:
    """`function`, at which a compiled caller breaks its graph."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        # Not as a decorator from the start: that alone would import the whole compiler.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return call
