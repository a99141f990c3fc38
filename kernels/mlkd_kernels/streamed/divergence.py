"""Divergences of two rows of log-probabilities, with their closed gradients.

P is the teacher's distribution, Q the student's, and `slope` the gradient by the student's scores:
q (u - sum_v q_v u_v) for any divergence whose derivative by q is u. All may write over log_p and
log_q.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Makes slope [N, V], once and after the rows only.
Slope = Callable[[], Tensor]
# log_p [N, V], log_q [N, V], beta -> rows [N] and what makes their slope
Divergence = Callable[[Tensor, Tensor, float], tuple[Tensor, Slope]]


def forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Slope]:
    p = log_p.exp()
    rows = log_p.sub_(log_q).mul_(p).sum(-1)
    return rows, lambda: log_q.exp_().sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Slope]:
    q = log_q.exp()
    gap = log_q.sub_(log_p)
    rows = torch.mul(gap, q, out=log_p).sum(-1)
    return rows, lambda: gap.sub_(rows.unsqueeze(-1)).mul_(q)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Slope]:
    log_m, q = _log_mixture(log_p, log_q, beta), log_q.exp()
    p = log_p.exp()
    from_p = log_p.sub_(log_m).mul_(p).sum(-1)
    gap = log_q.sub_(log_m)
    from_q = torch.mul(gap, q, out=p).sum(-1)
    rows = beta * from_p + (1 - beta) * from_q
    return rows, lambda: gap.sub_(from_q.unsqueeze(-1)).mul_(q).mul_(1 - beta)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Slope]:
    p = log_p.exp()
    gap = log_p.sub_(_log_mixture(log_p, log_q, beta))
    rows = p.mul_(gap).sum(-1)

    def slope() -> Tensor:
        # P / M - 1, whose mean is as exact as 0 where P is Q.
        q, excess = log_q.exp_(), gap.expm1_()
        mean = torch.mul(excess, q, out=p).sum(-1, keepdim=True)
        return excess.neg_().add_(mean).mul_(q).mul_(1 - beta)

    return rows, slope


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Slope]:
    q = log_q.exp()
    gap = log_q.sub_(_log_mixture(log_q, log_p, beta))
    rows = torch.mul(gap, q, out=log_p).sum(-1)

    def slope() -> Tensor:
        u = gap.sub_(torch.expm1(gap, out=log_p), alpha=beta)
        return _centred(u, q, log_p)

    return rows, slope


def tvd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Slope]:
    q = log_q.exp_()
    gap = log_p.exp_().neg_().add_(q)
    rows = gap.abs().sum(-1) / 2
    return rows, lambda: _centred(gap.sign_().div_(2), q, torch.empty_like(q))


def cross_entropy(log_q: Tensor, labels: Tensor) -> tuple[Tensor, Slope]:
    # Where no label is the row weighs 0; it must only not be read outside.
    labels = labels.clamp_min(0).unsqueeze(-1)
    rows = -log_q.gather(-1, labels).squeeze(-1)

    def slope() -> Tensor:
        q = log_q.exp_()
        return q.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=q.dtype))

    return rows, slope


def _centred(u: Tensor, q: Tensor, spare: Tensor) -> Tensor:  # [N, V]
    mean = torch.mul(u, q, out=spare).sum(-1, keepdim=True)
    return u.sub_(mean).mul_(q)


def _log_mixture(log_first: Tensor, log_second: Tensor, beta: float) -> Tensor:
    """log(beta * first + (1 - beta) * second), exactly log_first where both are the same."""
    gap = log_first - log_second
    share = torch.full_like(gap, beta).masked_fill_(gap > 0, 1 - beta)
    return (
        gap.abs_().neg_().expm1_().mul_(share).log1p_().add_(torch.maximum(log_first, log_second))
    )


KINDS: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
}
