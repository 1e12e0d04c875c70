"""A step's gradients against plain torch's gradients of the loss written out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import training.step
from loaders.batch import Slowest
from training.distributed import Group
from training.meter import Meter
from training.precision import Precision
from training.step import gradients

CLIP_SHAPE, NUM_CLASSES = (2, 3, 3, 3), 4
NOTHING = Slowest("read", "train-000000", 1.0)


@dataclass(frozen=True)
class Clips:
    """What a step uses of a batch: video uint8 (B, T, H, W, 3), label int64 (B,), weight float32 (B,)."""

    video: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    slowest: Slowest = NOTHING
    keypoints: torch.Tensor | None = None

    def split(self, sizes: list[int]) -> list[Clips]:
        """The same clips as micro-batches."""
        return [Clips(*parts) for parts in zip(self.video.split(sizes), self.label.split(sizes), self.weight.split(sizes), strict=True)]


class Tiny(nn.Module):
    """Two layers over all pixels; biases too, so that a clip of zeros still has gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(54, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.layers(video.float() / 255)


class SeenMeter(Meter):
    """A meter that tells how often it waited and whether it does now."""

    def __init__(self) -> None:
        super().__init__()
        self.num_waits, self.is_waiting = 0, False

    def take(self, batches: Iterator[Any]) -> Any:
        self.num_waits, self.is_waiting = self.num_waits + 1, True
        batch = super().take(batches)
        self.is_waiting = False
        return batch


class FakeParallel(nn.Module):
    """Stands in for DistributedDataParallel: tells for each forward and backward whether it ran inside `no_sync`."""

    def __init__(self, module: Tiny) -> None:
        super().__init__()
        self.module = module
        self.num_no_syncs, self.is_silent = 0, False
        self.silent_forwards: list[bool] = []
        self.silent_backwards: list[bool] = []
        next(module.parameters()).register_hook(lambda _: self.silent_backwards.append(self.is_silent))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        self.silent_forwards.append(self.is_silent)
        logits: torch.Tensor = self.module.__call__(video)
        return logits

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.num_no_syncs, self.is_silent = self.num_no_syncs + 1, True
        yield
        self.is_silent = False


def tiny() -> Tiny:
    torch.manual_seed(1)
    return Tiny()


def clips(weights: list[float], seed: int = 0) -> Clips:
    """One seeded clip for each weight."""
    chance, count = torch.Generator().manual_seed(seed), len(weights)
    video = torch.randint(0, 256, (count, *CLIP_SHAPE), dtype=torch.uint8, generator=chance)
    return Clips(video, torch.randint(0, NUM_CLASSES, (count,), generator=chance), torch.tensor(weights))


def stepped(batches: list[Clips], rank_batch: int, mode: str = "fp32") -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss that `gradients` gives, and the gradients it leaves in the tiny model."""
    model = tiny()
    loss = gradients(model, iter(batches), len(batches), rank_batch, Precision(mode, torch.device("cpu")), Meter())
    return loss, grads(model)


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def plain(batch: Clips, rank_batch: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same by the definition, in plain torch and one piece."""
    model = tiny()
    loss = (batch.weight * F.cross_entropy(model(batch.video), batch.label, reduction="none")).sum() / rank_batch
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("weights", [[1.0] * 6, [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.0] * 6, [1.0], [0.0]])
def test_loss_and_gradients_are_those_of_the_weighted_sum_over_the_rank_s_batch(weights: list[float]) -> None:
    loss, found = stepped([clips(weights)], len(weights))
    expected_loss, expected = plain(clips(weights), len(weights))
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert (loss > 0) == any(weights)


@pytest.mark.parametrize("sizes", [[6], [3, 3], [2, 2, 2], [1] * 6, [5, 1]])
def test_micro_batches_add_up_to_one_batch(sizes: list[int]) -> None:
    batch = clips([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])  # a mean over each micro-batch's own clips, or own weights, would show
    loss, found = stepped(batch.split(sizes), 6)
    expected_loss, expected = plain(batch, 6)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)


def test_a_clip_of_weight_0_contributes_nothing_but_still_counts_in_the_mean() -> None:
    batch = clips([1.0, 0.0, 1.0])
    video, label = batch.video.clone(), batch.label.clone()
    video[1], label[1] = 255 - video[1], (label[1] + 1) % NUM_CLASSES
    loss, found = stepped([batch], 3)
    other_loss, other = stepped([replace(batch, video=video, label=label)], 3)
    alone_loss, alone = plain(Clips(batch.video[::2], batch.label[::2], batch.weight[::2]), 3)
    torch.testing.assert_close((loss, found), (other_loss, other), rtol=0, atol=0)
    torch.testing.assert_close((loss, found), (alone_loss, alone))


def test_gradients_that_are_there_already_are_added_to() -> None:
    model, precision = tiny(), Precision("fp32", torch.device("cpu"))
    for _ in range(2):
        gradients(model, iter([clips([1.0, 1.0])]), 1, 2, precision, Meter())
    torch.testing.assert_close(grads(model), [2 * grad for grad in plain(clips([1.0, 1.0]), 2)[1]])


def test_the_loss_is_not_the_scaled_one_of_fp16() -> None:
    loss, found = stepped(clips([1.0] * 4).split([2, 2]), 4, "fp16")
    expected_loss, expected = plain(clips([1.0] * 4), 4)
    torch.testing.assert_close(loss, expected_loss, rtol=0.01, atol=0)
    torch.testing.assert_close(found[-1], 65536 * expected[-1], rtol=0.01, atol=1)  # the scale that GradScaler begins with


def test_the_meter_waits_once_a_micro_batch_and_only_for_the_data() -> None:
    model, meter, precision = tiny(), SeenMeter(), Precision("fp32", torch.device("cpu"))
    waited, computed = [], []
    model.register_forward_pre_hook(lambda *_: computed.append(meter.is_waiting))

    def load() -> Iterator[Clips]:
        while True:
            waited.append(meter.is_waiting)
            yield clips([1.0])

    gradients(model, load(), 3, 3, precision, meter)
    assert meter.num_waits == 3
    assert waited == [True] * 3 and computed == [False] * 3


@pytest.mark.parametrize("num_batches", [1, 2, 4])
def test_only_the_last_micro_batch_communicates(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    monkeypatch.setattr(training.step, "DistributedDataParallel", FakeParallel)
    model, batch = FakeParallel(tiny()), clips([1.0] * num_batches)
    gradients(model, iter(batch.split([1] * num_batches)), num_batches, num_batches, Precision("fp32", torch.device("cpu")), Meter())
    assert model.num_no_syncs == num_batches - 1
    assert model.silent_forwards == model.silent_backwards == [True] * (num_batches - 1) + [False]
    torch.testing.assert_close(grads(model), plain(batch, num_batches)[1])


def test_a_step_takes_its_own_micro_batches_and_leaves_the_rest() -> None:
    batches = iter([clips([1.0], seed) for seed in range(3)])
    gradients(tiny(), batches, 2, 2, Precision("fp32", torch.device("cpu")), Meter())
    torch.testing.assert_close(next(batches).video, clips([1.0], 2).video)


def test_a_step_changes_no_parameter() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    gradients(model, iter([clips([1.0])]), 1, 1, Precision("fp32", torch.device("cpu")), Meter())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_step_of_no_micro_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="no micro-batches"):
        stepped([], 1)


def test_cublas_without_room_for_itself_counts_as_out_of_memory() -> None:
    assert training.step.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not training.step.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert training.step.is_out_of_memory(torch.cuda.OutOfMemoryError())


def test_a_resumed_run_makes_room_again_where_its_micro_batch_needed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    made: list[bool] = []
    monkeypatch.setattr(training.step, "fits", lambda model, shape, size, precision: size <= 4 and bool(made))
    group, model = Group(0, 1, 0, torch.device("cuda", 0), "single"), torch.nn.Linear(1, 1)
    words = (model, (1,), 8, 1, Precision("fp32", torch.device("cpu")), group)
    found = training.step.choose_micro_batch(*words, None, lambda: made.append(True))
    assert (found, made) == (4, [True])
    made.clear()
    assert training.step.choose_micro_batch(*words, {"gpu": "a GPU", "micro_batch": 4}, lambda: made.append(True)) == 4
    assert made == [True]
