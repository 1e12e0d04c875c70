"""One optimiser step's gradients: micro-batches forward and backward, and how many clips fit at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from inspect import signature
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clips.errors import InputError

from .distributed import Group
from .meter import Meter, Slowest
from .mixing import Labelled, losses
from .precision import Precision, largest_micro_batch


class Weighted(Labelled, Protocol):
    """Also weight (B,), 0 for a clip that could not be read, and what was slowest."""

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def slowest(self) -> Slowest: ...


WeightedBatch = TypeVar("WeightedBatch", bound=Weighted)


def gradients(
    model: nn.Module,
    batches: Iterator[WeightedBatch],
    num_batches: int,
    rank_batch: int,
    precision: Precision,
    meter: Meter,
    mix: Callable[[WeightedBatch], torch.Tensor] | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds the gradients of the mean loss over this rank's `rank_batch` clips, and gives that loss, fp32 on the device.

    `mix` may change a micro-batch's clips in place and gives its targets (B, K); without it they are the labels.

    DistributedDataParallel then means over the ranks, once a step: earlier micro-batches do not communicate.
    """
    total: torch.Tensor | None = None
    for number in range(num_batches):
        batch = meter.take(batches)
        targets = mix(batch) if mix else batch.label
        wait = isinstance(model, DistributedDataParallel) and number < num_batches - 1
        with cast(DistributedDataParallel, model).no_sync() if wait else nullcontext():
            with precision.autocast():
                logits = model(batch.video) if batch.keypoints is None else model(batch.video, batch.keypoints)
            loss = (losses(logits, targets, class_weights) * batch.weight).sum() / rank_batch
            precision.backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise ValueError("a step of no micro-batches")
    return total


def in_parallel(model: nn.Module) -> DistributedDataParallel:
    """The model with gradients meant over the ranks. Its buffers are tables that never change: they are not sent before each forward."""
    flag = "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{flag: False})  # type: ignore[arg-type]  # torch 2.13 renamed the flag


def choose_micro_batch(
    model: nn.Module,
    clip_shape: tuple[int, ...],
    rank_batch: int,
    unit: int,
    precision: Precision,
    group: Group,
    saved: Mapping[str, Any] | None,
    make_room: Callable[[], None] | None = None,
) -> int:
    """All of a rank's step on a CPU; on a GPU the most clips whose step fits in its memory, in whole units, the least over all ranks, found once.

    Where not even one unit fits, `make_room` is called and the search begins again.
    """
    if group.device.type != "cuda":
        return rank_batch
    name = torch.cuda.get_device_name(group.device)
    is_known = bool(saved) and saved["gpu"] == name and rank_batch % saved["micro_batch"] == 0 and saved["micro_batch"] % unit == 0  # type: ignore[index]
    if all(group.gather_objects(is_known)) and saved:  # of all ranks: the others' GPUs may be of another kind
        if make_room is not None and not fits(model, clip_shape, int(saved["micro_batch"]), precision):
            make_room()  # as when it was found
        return int(saved["micro_batch"])

    def search() -> int:
        return unit * largest_micro_batch(lambda units: fits(model, clip_shape, units * unit, precision), rank_batch // unit)

    try:
        found = search()
    except InputError:
        if make_room is None:
            raise
        make_room()
        found = search()
    return min(group.gather_objects(found))


def fits(model: nn.Module, clip_shape: tuple[int, ...], size: int, precision: Precision) -> bool:
    """Whether a step of `size` clips fits into the GPU's memory, AdamW's two moments and a tenth to spare included; leaves no gradients."""
    try:
        _try_step(model, (size, *clip_shape), precision)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Also where cuBLAS finds no room for its own workspace, which torch does not call by that name."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def _try_step(model: nn.Module, shape: tuple[int, ...], precision: Precision) -> None:
    moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
    free_bytes = torch.cuda.mem_get_info(precision.device)[0]
    spare = torch.empty(free_bytes // 10, dtype=torch.uint8, device=precision.device)  # for uploads, buckets and fragments
    with precision.autocast():
        # `forward`, which is never compiled: each size that is tried would cost a compilation
        loss = model.forward(torch.zeros(shape, dtype=torch.uint8, device=precision.device)).float().sum()
    loss.backward()
    del moments, spare
