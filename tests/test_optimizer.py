"""Which parameters decay, and that the result is AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clips.errors import InputError
from training.optimizer import OptimizerConfig, build_optimizer, has_decay, set_lr


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


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The weight decay of each parameter, by name; a parameter in two groups fails."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays: dict[str, float] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in decays
            decays[names[id(parameter)]] = group["weight_decay"]
    return decays


def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = Small()
    decays = groups_of(model, build_optimizer(model, OptimizerConfig(weight_decay=0.3)))
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


@pytest.mark.parametrize(
    ("flag", "changes"),
    [("--weight-decay", {"weight_decay": -1.0}), ("--betas", {"betas": (0.9, 1.0)}), ("--clip-grad", {"clip_grad": float("nan")})],
)
def test_a_wrong_value_names_its_flag(flag: str, changes: dict) -> None:
    with pytest.raises(InputError, match=rf"^{flag} "):
        OptimizerConfig(**changes)
