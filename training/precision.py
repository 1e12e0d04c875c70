"""Mixed precision, and the largest number of clips that fits in memory at once.

with autocast(): loss -> backward(loss) (once or, accumulating, several times) -> step(): unscale, clip, update
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from clips.errors import InputError
from clips.registry import check_name

MODES = ("auto", "bf16", "fp16", "fp32")
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # below it gradients would overflow fp16 as they are


class Precision:
    """One training's number format: bf16 where the GPU has it, fp16 with a loss scale on older ones, fp32 on the CPU; parameters stay fp32."""

    def __init__(self, mode: str, device: torch.device) -> None:
        check_name(MODES, mode, "--precision")
        self.mode = native_mode(device) if mode == "auto" else mode
        self.device = device
        if self.mode == "bf16" and device.type == "cuda" and native_mode(device) != "bf16":
            raise InputError("--precision bf16: this GPU has no bf16 units (they came with compute capability 8.0). Give fp16 or auto.")
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.mode == "fp16")

    def autocast(self) -> torch.autocast:
        """The context for forward and loss; leave it before `backward`."""
        if self.mode == "fp32":
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=AUTOCAST_DTYPES[self.mode])

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss`, scaled where fp16 needs it."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], clip_grad: float) -> torch.Tensor:
        """One update; gives the gradients' norm before clipping, fp32 on the device: reading it is the caller's wait for the GPU.

        `clip_grad` 0 is no limit. A norm that is not finite changes no parameter, without a wait. Under fp16 it also halves the scale and is given as
        infinite, which is how the scale finds its value, until the scale falls below 1: from there on no scale helps, and it is given as NaN.
        """
        self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)
        if self._scaler.is_enabled():
            self._scaler.step(optimizer)
        elif all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # what a GradScaler gives fused optimisers, which then skip
            optimizer.step()
        elif norm.isfinite():  # a wait, for optimisers that are not fused
            optimizer.step()
        self._scaler.update()
        return self._told(norm) if self._scaler.is_enabled() else norm

    def _told(self, norm: torch.Tensor) -> torch.Tensor:
        scale = self._scaler.scale(torch.ones_like(norm))  # the scale itself, on the device: get_scale() would wait
        return torch.where(norm.isfinite(), norm, torch.where(scale < SMALLEST_SCALE, math.nan, math.inf))

    def state_dict(self) -> dict[str, Any]:  # Any: torch's own signature
        """The loss scale and its counters; empty without fp16."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:  # Any: torch's own signature
        """Continues with a saved loss scale; a state from another precision is left alone, its scale means nothing here."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)


def native_mode(device: torch.device) -> str:
    """bf16, fp16 or fp32: what this device is fast in. torch.cuda.is_bf16_supported() also counts slow emulation, so the capability decides."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def largest_micro_batch(fits: Callable[[int], bool], rank_batch: int) -> int:
    """The largest divisor of `rank_batch` for which `fits` is true; all divisors below one that fits are taken to fit.

    The whole batch is tried first, then the divisors are halved: at most 2 + log2(number of divisors) trials, 5 for 64.
    """
    divisors = [size for size in range(1, rank_batch + 1) if rank_batch % size == 0]
    if fits(rank_batch):
        return rank_batch
    fitting, failing = -1, len(divisors) - 1  # places in `divisors`
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(divisors[middle]):
            fitting = middle
        else:
            failing = middle
    if fitting < 0:
        raise InputError(
            "--micro-batch: not even one clip fits into this device's memory. Take a smaller model or a larger GPU."
        )
    return divisors[fitting]
