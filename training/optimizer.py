"""The optimiser: which parameters decay, and how fast each depth of the model learns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from clips.errors import InputError

# Tables of learned vectors (class token, positions, times) have two or more dimensions, yet decay would pull them to 0 as it would a bias.
TABLE = re.compile(r"(^|[._])((cls|mask)_token|(position|pos|time|temporal)_embed(ding|dings)?)($|\.)")
FUSED_DEVICES = ("cpu", "cuda")
LayerOf = Callable[[str], int]  # from a parameter's name to its depth, 0 at the input


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov's momentum, the first of --betas."""
    weight_decay: float = 0.05
    """Weight decay of the matrices; biases, norms, class token and position tables have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and of its square."""
    clip_grad: float = 1.0
    """Largest norm of all gradients together; 0 is no limit."""
    layer_decay: float = 1.0
    """Each layer's learning rate over that of the layer after it; the head and the joints' channel have the full rate, 1 gives it to all."""

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "sgd"):
            raise InputError(f"--optimizer {self.optimizer}: expected adamw or sgd.")
        if not self.weight_decay >= 0:
            raise InputError(f"--weight-decay {self.weight_decay}: expected 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"--betas {self.betas[0]} {self.betas[1]}: expected two numbers from 0 to below 1.")
        if not self.clip_grad >= 0:
            raise InputError(f"--clip-grad {self.clip_grad}: expected 0 (off) or a norm above 0.")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"--layer-decay {self.layer_decay}: expected a factor above 0 and at most 1 (off).")


def build_optimizer(model: nn.Module, config: OptimizerConfig, layer_of: LayerOf = lambda name: 0, num_layers: int = 1) -> torch.optim.Optimizer:
    """Over the trainable parameters, on the device where they are; its rates are 0 until `set_lr`."""
    groups = groups_of(model, config, layer_of, num_layers)
    fused = all(parameter.device.type in FUSED_DEVICES and parameter.is_floating_point() for group in groups for parameter in group["params"]) or None
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=config.betas[0], nesterov=config.betas[0] > 0, fused=fused)
        for group in groups if config.betas[0] else ():  # torch's fused kernel leaves them unwritten where the first step is skipped
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=fused)


def groups_of(model: nn.Module, config: OptimizerConfig, layer_of: LayerOf, num_layers: int) -> list[dict[str, Any]]:  # Any: torch's own groups
    """Parameters of one depth and one decay together, from the input to the head; `lr_scale` is layer decay to the power of the depths after it.

    A depth is 0 … num_layers - 1, as in BEiT (Bao et al. 2021) and VideoMAE: embeddings, each layer, the rest.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = layer_of(name) if config.layer_decay != 1 else num_layers - 1
        if not 0 <= depth < num_layers:
            raise ValueError(f"{name} has depth {depth} of {num_layers}")
        decays = has_decay(name, parameter)
        scale = config.layer_decay ** (num_layers - 1 - depth)
        empty = {"params": [], "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": scale}
        groups.setdefault((depth, not decays), empty)["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter; expected at least the classifier's.")
    return [groups[key] for key in sorted(groups)]


def has_decay(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay pulls on this parameter: matrices and kernels, not vectors and not tables."""
    return parameter.ndim > 1 and not name.endswith("bias") and TABLE.search(name) is None


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group the rate of this step, times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def rates_in_words(optimizer: torch.optim.Optimizer, peak: float) -> str:
    """Which rates the groups come to at the schedule's peak."""
    rates = sorted(peak * group["lr_scale"] for group in optimizer.param_groups)
    return f"{rates[0]:.3g} for all" if rates[0] == rates[-1] else f"{rates[0]:.3g} at the embeddings to {rates[-1]:.3g} at the head"
