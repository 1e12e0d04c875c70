"""Self-attention that never holds its matrix of scores: one product for query, key and value, then torch's fused kernel.

    hidden (B, N, D) -> qkv (B, N, 3 D) -> scaled_dot_product_attention -> (B, N, D)

Both take over the modules, and so the state dict keys, of transformers' layers. transformers' TimeSformer knows only the plain
way, which keeps every score for the backward pass: 12.6 against 7.1 GiB a clip at 39x320 in bfloat16 (the saved tensors, counted on a CPU).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ROWS = 65535  # CUDA kernels run the batch along a grid axis that ends here; attention over time has a row for each place of each clip


class SeparateAttention(nn.Module):
    """VideoMAE's: query, key and value are parameters of their own, joined in the forward pass.

    Keeps a tenth less for the backward pass. On a CPU thread attention costs 0-1 % more at 392 to 3136 tokens, 5 % at 8 clips of
    128 (measured, ViT-B): the joined weights are a copy.
    """

    def __init__(self, attention: Any, num_heads: int, dropout: float) -> None:  # Any: transformers' attention, of another class for each model
        super().__init__()
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.num_heads = num_heads
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """(B, N, D), and no scores, in the order of transformers' return values."""
        parts = self.query, self.key, self.value
        qkv = F.linear(hidden, torch.cat([part.weight for part in parts]), _joined_bias(parts))
        return attend(qkv, self.num_heads, self.dropout if self.training else 0.0), None


class JointAttention(nn.Module):
    """TimeSformer's: query, key and value are one parameter."""

    def __init__(self, attention: Any, num_heads: int, dropout: float) -> None:  # Any: as above
        super().__init__()
        self.qkv = attention.qkv
        self.num_heads = num_heads
        self.dropout = dropout

    def forward(self, hidden: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        """(B, N, D) alone; the second argument is what transformers hands over, always False here."""
        return (attend(self.qkv(hidden), self.num_heads, self.dropout if self.training else 0.0),)


def attend(qkv: Tensor, num_heads: int, dropout: float) -> Tensor:
    """softmax(q k / sqrt(d)) v of (B, N, 3 D), as (B, N, D)."""
    # Slices of the last axis: their gradients are put side by side in one copy, those of an axis of 3 are copied twice.
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]
    if len(qkv) <= MAX_ROWS:
        found = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], dropout_p=dropout)
    else:
        pieces = zip(*(part.split(MAX_ROWS) for part in heads), strict=True)
        found = torch.cat([F.scaled_dot_product_attention(query, key, value, dropout_p=dropout) for query, key, value in pieces])
    return found.transpose(1, 2).flatten(2)


def _joined_bias(parts: tuple[nn.Linear, ...]) -> Tensor | None:
    """Bias (3 D,); zeros where a part has none, as the key in some versions of transformers. None where no part has one."""
    known = next((part.bias for part in parts if part.bias is not None), None)
    if known is None:
        return None
    return torch.cat([torch.zeros_like(known) if part.bias is None else part.bias for part in parts])
