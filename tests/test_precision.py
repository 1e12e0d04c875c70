"""Precision against plain torch steps, and the search for the micro-batch against trying every divisor."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clips.errors import InputError
from training.optimizer import OptimizerConfig, build_optimizer, set_lr
from training.precision import Precision, largest_micro_batch, native_mode

CPU = torch.device("cpu")


def trained(mode: str, clip_grad: float, losses: int = 1) -> tuple[nn.Linear, torch.Tensor]:
    """A layer after one step on fixed numbers, and the gradient's norm."""
    torch.manual_seed(0)
    model, precision = nn.Linear(8, 4), Precision(mode, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.01, fused=True)  # a large eps: the step depends on the gradient's size
    for part in torch.linspace(-1, 3, 64).reshape(8, 8).chunk(losses):
        with precision.autocast():
            loss = model(part).float().square().sum() / 512  # small enough for the first loss scale of 65536
        precision.backward(loss)
    return model, precision.step(optimizer, model.parameters(), clip_grad)


def test_auto_is_fp32_on_the_cpu() -> None:
    precision = Precision("auto", CPU)
    assert precision.mode == "fp32"
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(("capability", "mode"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")])
def test_auto_is_bf16_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], mode: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_mode(torch.device("cuda", 0)) == mode


@pytest.mark.parametrize(("mode", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_chosen_format(mode: str, dtype: torch.dtype) -> None:
    with Precision(mode, CPU).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_an_unknown_mode_and_bf16_on_an_old_gpu_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--precision fp8"):
        Precision("fp8", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(InputError, match="--precision bf16"):
        Precision("bf16", torch.device("cuda", 0))


def test_fp32_is_a_plain_torch_step() -> None:
    model, norm = trained("fp32", 0)
    torch.manual_seed(0)
    plain = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, eps=0.01, fused=True)
    (plain(torch.linspace(-1, 3, 64).reshape(8, 8)).square().sum() / 512).backward()
    expected_norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in plain.parameters() if parameter.grad is not None))
    optimizer.step()
    assert torch.equal(model.weight, plain.weight)
    assert norm.item() == pytest.approx(expected_norm, rel=1e-6)


@pytest.mark.parametrize(("mode", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_the_loss_scale_is_gone_from_norm_and_step(mode: str, tolerance: float) -> None:
    exact, exact_norm = trained("fp32", 1.0)
    model, norm = trained(mode, 1.0)
    torch.testing.assert_close(model.weight, exact.weight, atol=tolerance * 0.1, rtol=0)
    torch.testing.assert_close(norm, exact_norm, atol=0, rtol=tolerance)


def test_several_backwards_are_one_step() -> None:
    whole, whole_norm = trained("fp32", 1.0)
    parts, parts_norm = trained("fp32", 1.0, losses=4)
    torch.testing.assert_close(parts.weight, whole.weight)
    torch.testing.assert_close(parts_norm, whole_norm)


def test_clipping_limits_the_gradient_but_reports_the_norm_before() -> None:
    free, free_norm = trained("fp32", 0)
    clipped, clipped_norm = trained("fp32", 0.01)
    assert torch.equal(clipped_norm, free_norm)
    gradients = [parameter.grad for parameter in clipped.parameters() if parameter.grad is not None]
    assert torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])).item() == pytest.approx(0.01, rel=1e-3)
    assert not torch.equal(clipped.weight, free.weight)


def test_no_limit_leaves_a_large_gradient_as_it_is() -> None:
    weight = torch.zeros(4, requires_grad=True)
    weight.grad = torch.full((4,), 50.0)
    norm = Precision("fp32", CPU).step(torch.optim.SGD([weight], lr=1.0), [weight], 0)
    assert norm.item() == 100.0
    assert weight.tolist() == [-50.0] * 4


def test_an_overflow_changes_nothing_and_halves_the_scale() -> None:
    model, precision = nn.Linear(4, 4), Precision("fp16", CPU)
    before, scale = model.weight.clone(), precision.state_dict()["scale"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with precision.autocast():
        loss = (model(torch.full((1, 4), 60000.0)) * 60000.0).sum()
    precision.backward(loss)
    norm = precision.step(optimizer, model.parameters(), 1.0)
    assert not math.isfinite(norm.item())
    assert torch.equal(model.weight, before)
    assert precision.state_dict()["scale"] == scale / 2
    other = Precision("fp16", CPU)
    other.load_state_dict(precision.state_dict())
    assert other.state_dict() == precision.state_dict()


def test_infinite_gradients_are_a_fault_once_no_loss_scale_helps() -> None:
    """From 65536 the scale halves 16 times to 1; the next overflow is one of the gradients as they are."""
    weight, precision = torch.nn.Parameter(torch.zeros(2)), Precision("fp16", CPU)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)

    def step(gradient: float) -> torch.Tensor:
        precision.backward((weight * 0).sum())
        weight.grad = torch.full((2,), gradient)
        return precision.step(optimizer, [weight], 1.0)

    norms = [step(value).item() for value in [math.nan, math.inf] * 8 + [math.nan, math.inf]]
    assert [norm == math.inf for norm in norms] == [True] * 16 + [False] * 2 and all(math.isnan(norm) for norm in norms[16:])
    assert precision.state_dict()["scale"] == 0.25 and torch.equal(weight, torch.zeros(2))
    assert step(1.0).item() == pytest.approx(math.sqrt(2) / 0.25) and weight[0] < 0  # a finite one trains on


def test_a_state_of_another_precision_is_left_alone() -> None:
    fp16, fp32 = Precision("fp16", CPU), Precision("fp32", CPU)
    assert fp32.state_dict() == {}
    before = fp16.state_dict()
    fp16.load_state_dict(fp32.state_dict())
    fp32.load_state_dict(fp16.state_dict())
    assert fp16.state_dict() == before


@settings(deadline=None)
@given(rank_batch=st.integers(1, 500), limit=st.integers(1, 600))
def test_the_micro_batch_is_the_largest_divisor_that_fits(rank_batch: int, limit: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    divisors = [size for size in range(1, rank_batch + 1) if rank_batch % size == 0]
    assert largest_micro_batch(fits, rank_batch) == max(size for size in divisors if size <= limit)
    assert len(tried) == len(set(tried)) <= 2 + math.log2(len(divisors))


def test_a_whole_batch_that_fits_is_tried_once() -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return True

    assert largest_micro_batch(fits, 64) == 64
    assert tried == [64]


@pytest.mark.parametrize("rank_batch", [1, 7, 64])
def test_one_clip_that_does_not_fit_is_an_error_that_says_what_to_do(rank_batch: int) -> None:
    with pytest.raises(InputError, match="--micro-batch: not even one clip"):
        largest_micro_batch(lambda size: False, rank_batch)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_are_not_finite_change_nothing_also_the_first(optimizer: Literal["adamw", "sgd"], fused: bool) -> None:
    model = torch.nn.Linear(64, 64)
    made = build_optimizer(model, OptimizerConfig(optimizer=optimizer, weight_decay=0.0))
    for group in made.param_groups:
        group["fused"] = fused or None
    set_lr(made, 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    precision = Precision("fp32", torch.device("cpu"))
    for value in (float("nan"), 0.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        precision.step(made, model.parameters(), 1.0)
        assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
