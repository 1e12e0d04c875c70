"""AdamW, with weight decay for the matrices only."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from clips.errors import InputError

# Tables of learned vectors (class token, positions, times) have two or more dimensions, yet decay would pull them to 0 as it would a bias.
TABLE = re.compile(r"(^|[._])((cls|mask)_token|(position|pos|time|temporal)_embed(ding|dings)?)($|\.)")
FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates (AdamW)."""

    weight_decay: float = 0.05
    """Weight decay of the matrices; biases, norms, class token and position tables have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and of its square."""
    clip_grad: float = 1.0
    """Largest norm of all gradients together; 0 is no limit."""

    def __post_init__(self) -> None:
        if not self.weight_decay >= 0:
            raise InputError(f"--weight-decay {self.weight_decay}: expected 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"--betas {self.betas[0]} {self.betas[1]}: expected two numbers from 0 to below 1.")
        if not self.clip_grad >= 0:
            raise InputError(f"--clip-grad {self.clip_grad}: expected 0 (off) or a norm above 0.")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, on the device where they are; its rate is 0 until `set_lr`."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter; expected at least the classifier's.")
    groups = [
        {"params": [parameter for name, parameter in trainable if has_decay(name, parameter)], "weight_decay": config.weight_decay},
        {"params": [parameter for name, parameter in trainable if not has_decay(name, parameter)], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in FUSED_DEVICES and parameter.is_floating_point() for _, parameter in trainable)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=config.betas, fused=fused or None)


def has_decay(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay pulls on this parameter: matrices and kernels, not vectors and not tables."""
    return parameter.ndim > 1 and not name.endswith("bias") and TABLE.search(name) is None


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
