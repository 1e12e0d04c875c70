"""Which parameters decay, how fast each depth learns, and that the result is AdamW."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import nn

from clips.errors import InputError
from models import ModelConfig, build_model
from training.checkpoint import check_plain
from training.optimizer import OptimizerConfig, build_optimizer, groups_of, has_decay, rates_in_words, set_lr
from training.schedule import ScheduleConfig, lr_at


class Small(nn.Module):
    """One parameter of each kind, named as transformers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.position_embeddings = nn.Parameter(torch.ones(1, 9, 4))
        self.time_embeddings = nn.Parameter(torch.ones(1, 8, 4))
        self.patch_embeddings = nn.Conv3d(3, 4, 2)
        self.temporal_attention = nn.Linear(4, 4)
        self.layernorm = nn.LayerNorm(4)
        self.pos_embed = nn.Embedding(3, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer, value: str) -> dict[str, float]:
    """A value of each parameter's group, by name; a parameter in two groups fails."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, float] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group[value]
    return found


def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = Small()
    decays = by_name(model, build_optimizer(model, OptimizerConfig(weight_decay=0.3)), "weight_decay")
    assert set(decays) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, decay in decays.items() if decay == 0.3} == {"patch_embeddings.weight", "temporal_attention.weight"}
    assert set(decays.values()) == {0.3, 0.0}


@pytest.mark.parametrize(
    ("name", "shape", "decays"),
    [
        ("timesformer.embeddings.cls_token", (1, 1, 8), False),
        ("timesformer.embeddings.position_embeddings", (1, 5, 8), False),
        ("timesformer.embeddings.time_embeddings", (1, 5, 8), False),
        ("timesformer.encoder.layer.0.temporal_attention.attention.qkv.weight", (24, 8), True),
        ("timesformer.encoder.layer.0.temporal_dense.weight", (8, 8), True),
        ("videomae.embeddings.patch_embeddings.projection.weight", (8, 3, 2, 4, 4), True),
        ("videomae.encoder.layer.0.attention.attention.q_bias", (8,), False),
        ("module.rel_pos_bias", (8, 8), False),
        ("videomae.encoder.layer.0.layernorm_before.weight", (8,), False),
        ("classifier.weight", (2, 8), True),
    ],
)
def test_decay_goes_by_name_and_dimensions(name: str, shape: tuple[int, ...], decays: bool) -> None:
    assert has_decay(name, torch.zeros(shape)) == decays


def test_one_step_equals_adamw_by_hand() -> None:
    model = nn.Linear(3, 2)
    before, optimizer = copy.deepcopy(model), build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    set_lr(optimizer, 0.01)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # the first AdamW step moves by lr x sign(gradient), here +1 everywhere; the matrix has first shrunk by lr x decay
    torch.testing.assert_close(model.weight, before.weight * (1 - 0.01 * 0.1) - 0.01, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.bias, before.bias - 0.01, atol=1e-6, rtol=0)


def test_the_rate_is_zero_until_it_is_set() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_the_fused_kernel_is_used_on_the_cpu_too() -> None:
    assert build_optimizer(nn.Linear(3, 2), OptimizerConfig()).defaults["fused"] is True


def test_a_model_with_vectors_only_has_one_group() -> None:
    assert len(build_optimizer(nn.LayerNorm(4), OptimizerConfig()).param_groups) == 1


def test_a_frozen_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig())


def tiny(use_keypoints: Literal["none", "channel"] = "channel") -> Any:  # Any: ours has more than nn.Module tells
    return build_model(ModelConfig("videomae-tiny", use_keypoints=use_keypoints), ("nongesture", "gesture"))


def test_each_depth_of_a_model_of_ours_has_its_own_rate_and_the_joints_channel_the_full_one() -> None:
    """The tiny model has four layers, so its embeddings are five depths below the head."""
    model = tiny()
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.5), model.layer_of, model.num_layers)
    set_lr(optimizer, 1.0)
    rates = by_name(model, optimizer, "lr")
    assert set(rates) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}  # older transformers have a key.bias, kept at 0
    expected = {"embeddings.patch_embeddings.projection.weight": 1 / 32, "classifier.weight": 1.0, "fc_norm.weight": 1.0}
    expected |= {f"encoder.layer.{layer}.output.dense.weight": 0.5 ** (4 - layer) for layer in range(4)}
    for end, rate in expected.items():
        assert {value for name, value in rates.items() if name.endswith(end)} == {rate}, end
    (joints,) = (name for name, parameter in model.named_parameters() if parameter is model.projection.keypoint_weight)
    assert rates[joints] == 1.0
    assert set(rates.values()) == {0.5**power for power in range(6)}


def test_layer_decay_leaves_which_parameters_decay_as_it_was() -> None:
    model = tiny()
    plain = build_optimizer(model, OptimizerConfig(), model.layer_of, model.num_layers)
    layered = build_optimizer(model, OptimizerConfig(layer_decay=0.75), model.layer_of, model.num_layers)
    assert by_name(model, plain, "weight_decay") == by_name(model, layered, "weight_decay")
    assert len(plain.param_groups) == 2 and len(layered.param_groups) == 12
    assert all(group["params"] for group in layered.param_groups)


@pytest.mark.parametrize(("epoch", "factor"), [(0, 1.0), (34, 1.0), (35, 0.2), (79, 0.2), (80, 0.04)])
def test_the_schedule_and_the_depth_multiply(epoch: int, factor: float) -> None:
    """The peak for 64 clips is 1.25e-4; after one depth of layer decay 0.75 it is 9.375e-5."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.75), lambda name: int(name[0]), 2)
    set_lr(optimizer, lr_at(7 * epoch, 7, 100, 64, ScheduleConfig(warmup=0)))
    rates = by_name(model, optimizer, "lr")
    assert rates["0.weight"] == rates["0.bias"] == pytest.approx(9.375e-5 * factor)
    assert rates["1.weight"] == rates["1.bias"] == pytest.approx(1.25e-4 * factor)


def test_a_frozen_body_leaves_the_head_alone_at_the_full_rate() -> None:
    model = tiny("none")
    model.freeze()
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.75), model.layer_of, model.num_layers)
    set_lr(optimizer, 0.1)
    assert by_name(model, optimizer, "lr") == {"classifier.weight": 0.1, "classifier.bias": 0.1}


def test_a_saved_state_continues_in_the_same_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    build = partial(build_optimizer, model, OptimizerConfig(layer_decay=0.75), lambda name: int(name[0]), 2)
    saved, continued = build(), build()
    check_plain(saved.state_dict(), "optimizer")
    continued.load_state_dict(saved.state_dict())
    set_lr(continued, 1.0)
    assert [group["lr"] for group in continued.param_groups] == [0.75, 0.75, 1.0, 1.0]


def test_a_depth_outside_the_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="weight has depth 2 of 2"):
        groups_of(nn.Linear(3, 2), OptimizerConfig(layer_decay=0.5), lambda name: 2, 2)


def test_sgd_moves_by_nesterovs_momentum() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(model, OptimizerConfig(optimizer="sgd", weight_decay=0.0))
    set_lr(optimizer, 0.1)
    for expected in (-0.19, -0.461):  # a gradient of 1: steps of 0.1 x (1 + 0.9), then 0.1 x (1 + 0.9 x 1.9)
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected)


def test_the_rates_are_said_in_words() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    layered = build_optimizer(model, OptimizerConfig(layer_decay=0.5), lambda name: int(name[0]), 2)
    assert rates_in_words(layered, 1e-3) == "0.0005 at the embeddings to 0.001 at the head"
    assert rates_in_words(build_optimizer(model, OptimizerConfig()), 1e-3) == "0.001 for all"


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--optimizer", {"optimizer": "adam"}),
        ("--weight-decay", {"weight_decay": -1.0}),
        ("--betas", {"betas": (0.9, 1.0)}),
        ("--clip-grad", {"clip_grad": float("nan")}),
        ("--layer-decay", {"layer_decay": 0.0}),
        ("--layer-decay", {"layer_decay": 1.5}),
    ],
)
def test_a_wrong_value_names_its_flag(flag: str, changes: dict) -> None:
    with pytest.raises(InputError, match=rf"^{flag} "):
        OptimizerConfig(**changes)
