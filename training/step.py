"""One optimiser step's gradients: micro-batches forward and backward, and how many clips fit at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from inspect import signature
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .meter import Meter, Slowest
from .precision import Precision


class Labelled(Protocol):
    """What is used of a batch: uint8 clips (B, T, H, W, 3), label int64 (B,), weight (B,), 0 for a clip that could not be read."""

    @property
    def video(self) -> torch.Tensor: ...

    @property
    def label(self) -> torch.Tensor: ...

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def slowest(self) -> Slowest: ...


def gradients(model: nn.Module, batches: Iterator[Labelled], num_batches: int, rank_batch: int, precision: Precision, meter: Meter) -> torch.Tensor:
    """Adds the gradients of the mean loss over this rank's `rank_batch` clips, and gives that loss, fp32 on the device.

    DistributedDataParallel then means over the ranks, once a step: earlier micro-batches do not communicate.
    """
    total: torch.Tensor | None = None
    for number in range(num_batches):
        batch = meter.take(batches)
        wait = isinstance(model, DistributedDataParallel) and number < num_batches - 1
        with cast(DistributedDataParallel, model).no_sync() if wait else nullcontext():
            with precision.autocast():
                logits = model(batch.video)
            losses = F.cross_entropy(logits.float(), batch.label, reduction="none") * batch.weight
            loss = losses.sum() / rank_batch
            precision.backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise ValueError("a step of no micro-batches")
    return total


def in_parallel(model: nn.Module) -> DistributedDataParallel:
    """The model with gradients meant over the ranks. Its buffers are tables that never change: they are not sent before each forward."""
    flag = "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{flag: False})  # type: ignore[arg-type]  # torch 2.13 renamed the flag


def fits(model: nn.Module, clip_shape: tuple[int, ...], size: int, precision: Precision) -> bool:
    """Whether a step of `size` clips fits into the GPU's memory, AdamW's two moments and a tenth to spare included; leaves no gradients."""
    try:
        _try_step(model, (size, *clip_shape), precision)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True


def _try_step(model: nn.Module, shape: tuple[int, ...], precision: Precision) -> None:
    moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
    free_bytes = torch.cuda.mem_get_info(precision.device)[0]
    spare = torch.empty(free_bytes // 10, dtype=torch.uint8, device=precision.device)  # for uploads, buckets and fragments
    with precision.autocast():
        loss = model(torch.zeros(shape, dtype=torch.uint8, device=precision.device)).float().sum()
    loss.backward()
    del moments, spare
