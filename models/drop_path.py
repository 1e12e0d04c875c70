"""Stochastic depth (Huang et al. 2016): in training a clip skips a branch of a layer by chance."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """The branch's output with whole clips zeroed with chance `rate` and the rest divided by 1 - rate; untouched in evaluation.

    The chance comes from torch's global generator. `rows` is how many rows of the batch axis in a row belong to one clip.
    """

    def __init__(self, rate: float, rows: int = 1) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate {rate}, expected 0 to below 1")
        self.rate = rate
        self.rows = rows

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(len(branch) // self.rows, device=branch.device) >= self.rate
        factor = (kept / (1 - self.rate)).to(branch.dtype).repeat_interleave(self.rows)
        return branch * factor.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate}, rows={self.rows}"


class DroppedLinear(nn.Linear):
    """A linear layer, with its keys, that ends a branch."""

    def __init__(self, linear: nn.Linear, drop_path: DropPath) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.drop_path = drop_path

    def forward(self, hidden: Tensor) -> Tensor:
        return self.drop_path(super().forward(hidden))


def drop_rates(last: float, num_layers: int) -> list[float]:
    """The rate of each layer, from 0 at the first to `last`, as in both official codes."""
    return [last * layer / max(num_layers - 1, 1) for layer in range(num_layers)]


def after(dropout: nn.Module, drop_path: DropPath) -> nn.Module:
    """What takes the place of the dropout that ends a branch: itself, if it does anything, then drop path."""
    return nn.Sequential(dropout, drop_path) if isinstance(dropout, nn.Dropout) and dropout.p > 0 else drop_path
