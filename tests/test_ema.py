"""The average against its recurrence worked out by hand, and a model that gets its own weights back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training import checkpoint
from training.ema import Ema


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    made[1].requires_grad_(False)
    return made


def move(net: nn.Module, seed: int) -> None:
    """A step's change of every trained weight."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_the_average_is_the_recurrence_worked_out_by_hand(decay: float) -> None:
    net = model()
    ema, weight = Ema(net, decay), net.get_parameter("0.weight")
    expected = weight.detach().double().clone()
    for step in range(1, 40):
        move(net, step)
        ema.update()
        used = min(decay, (1 + step) / (10 + step))
        expected = used * expected + (1 - used) * weight.detach().double()
    torch.testing.assert_close(ema.state_dict()["average"]["0.weight"].double(), expected, rtol=0, atol=1e-5)


def test_weights_that_stand_still_are_their_own_average() -> None:
    net = model()
    ema = Ema(net, 0.99)
    move(net, 0)
    for _ in range(2000):
        ema.update()
    for name, value in ema.state_dict()["average"].items():
        torch.testing.assert_close(value, net.state_dict()[name], rtol=0, atol=1e-4)


def test_inside_the_model_has_the_average_and_outside_its_own_weights_also_after_an_error() -> None:
    net = model()
    ema = Ema(net, 0.9)
    move(net, 1)
    ema.update()
    own = copy.deepcopy(net.state_dict())
    parameters = list(net.parameters())
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.in_place():
        for name, value in ema.state_dict()["average"].items():
            assert torch.equal(net.state_dict()[name], value) and not torch.equal(value, own[name])
        assert torch.equal(net.state_dict()["1.weight"], own["1.weight"])
        raise RuntimeError("evaluation failed")
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
    assert all(before is after for before, after in zip(parameters, net.parameters(), strict=True))  # the optimiser's own


def test_the_state_has_the_models_own_keys_of_trained_weights() -> None:
    net = model()
    state = Ema(net, 0.9).state_dict()
    assert list(state["average"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    checkpoint.check_plain(state, "ema")
    assert all(state["average"][name].data_ptr() != net.state_dict()[name].data_ptr() for name in state["average"])


def test_a_continued_average_goes_on_as_if_it_had_never_stopped() -> None:
    quiet, stopped = model(), model()
    ema, before = Ema(quiet, 0.9), Ema(stopped, 0.9)
    for step in range(20):
        if step == 7:
            state, weights = copy.deepcopy(before.state_dict()), copy.deepcopy(stopped.state_dict())
            stopped = model(seed=5)
            before = Ema(stopped, 0.9)
            stopped.load_state_dict(weights)
            before.load_state_dict(state)
        for net, average in ((quiet, ema), (stopped, before)):
            move(net, step)
            average.update()
    for name, value in ema.state_dict()["average"].items():
        assert torch.equal(value, before.state_dict()["average"][name])
    assert before.updates == ema.updates == 20


def test_half_precision_weights_are_averaged_in_fp32() -> None:
    net = model().to(torch.bfloat16)
    ema = Ema(net, 0.9)
    for step in range(5):
        move(net, step)
        ema.update()
    assert {value.dtype for value in ema.state_dict()["average"].values()} == {torch.float32}
    with ema.in_place():
        assert net.get_parameter("0.weight").dtype == torch.bfloat16


def test_the_average_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        Ema(model(), 0.9).load_state_dict(Ema(nn.Linear(3, 2), 0.9).state_dict())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_out_of_range_is_an_error(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        Ema(model(), decay)


def test_steps_that_changed_nothing_neither_count_nor_move_the_average() -> None:
    net, quiet = model(), model()
    ema, expected = Ema(net, 0.9), Ema(quiet, 0.9)
    for step in range(6):
        move(net, step)
        ema.update(torch.tensor(True))
        before = {name: value.clone() for name, value in ema.state_dict()["average"].items()}
        for _ in range(step):
            ema.update(torch.tensor(False))
        assert all(torch.equal(value, before[name]) for name, value in ema.state_dict()["average"].items())
        move(quiet, step)
        expected.update()
    assert ema.updates == ema.state_dict()["updates"] == 6
    assert all(torch.equal(value, expected.state_dict()["average"][name]) for name, value in ema.state_dict()["average"].items())
