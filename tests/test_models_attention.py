"""Fused attention against transformers' own layers, and activation checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VideoMAEConfig
from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention
from transformers.models.videomae.modeling_videomae import VideoMAESelfAttention

from models import ModelConfig, attention, build_model
from models.attention import JointAttention, SeparateAttention
from tests.making_models import CLASSES, FAMILIES, clips, draw, plain_model


def both(family: str, **values: Any) -> tuple[nn.Module, nn.Module]:  # Any: values of a config
    """transformers' attention and ours, with the same numbers in parameters of their own."""
    config = plain_model(family, **values).config
    theirs = {"videomae": VideoMAESelfAttention, "timesformer": TimesformerSelfAttention}[family](config)
    draw(theirs, 0)
    ours = {"videomae": SeparateAttention, "timesformer": JointAttention}[family]
    return theirs.eval(), ours(copy.deepcopy(theirs), config.num_attention_heads, config.attention_probs_dropout_prob).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_transformers_and_so_do_its_gradients_under_the_same_keys(family: str, bias: bool) -> None:
    flag = "qv_bias" if family == "videomae" and hasattr(VideoMAEConfig, "qv_bias") else "qkv_bias"
    theirs, ours = both(family, **{flag: bias})
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    inputs = [torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2)]
    outputs = [module(x)[0] for module, x in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
    for output in outputs:
        (output * torch.linspace(-1, 1, 48)).mean().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-6)
    for key, parameter in ours.named_parameters():
        expected = theirs.get_parameter(key).grad
        assert expected is not None and (key == "key.bias" or float(expected.abs().max()) > 1e-5)  # in 5.17 alone, and softmax cancels it
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-6, msg=key)


class Calls:
    """torch's attention, with what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.dropouts: list[float] = []
        real = F.scaled_dot_product_attention

        def recorded(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
            self.rows.append(len(query))
            self.dropouts.append(dropout_p)
            return real(query, key, value, dropout_p=dropout_p)

        monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_of_attention_is_on_in_training_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    _, ours = both(family, attention_probs_dropout_prob=0.5)
    hidden = torch.randn(2, 9, 48)
    still = ours(hidden)[0]
    assert torch.equal(ours(hidden)[0], still)
    ours.train()
    assert not torch.equal(ours(hidden)[0], ours(hidden)[0])
    assert calls.dropouts == [0.0, 0.0, 0.5, 0.5]
    with torch.no_grad():
        mean = torch.stack([ours(hidden)[0] for _ in range(400)]).mean(0)
        assert float((mean - still).norm() / still.norm()) < 0.2


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_more_rows_than_a_kernel_takes_are_attended_in_pieces(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = both("timesformer")
    hidden = torch.randn(8, 5, 48)
    whole = ours(hidden)[0]
    calls = Calls(monkeypatch)
    monkeypatch.setattr(attention, "MAX_ROWS", rows)
    torch.testing.assert_close(ours(hidden)[0], whole, rtol=0, atol=1e-6)
    assert sum(calls.rows) == 8 and max(calls.rows) <= rows


def kept(model: nn.Module, video: Tensor) -> list[tuple[int, ...]]:
    """The shapes of what the backward pass keeps."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(video)
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_no_matrix_of_scores_is_kept(family: str) -> None:
    model = build_model(ModelConfig(f"{family}-tiny", size=128), CLASSES)
    tokens = {"videomae": 8 * 64, "timesformer": 65}[family]
    shapes = kept(model, clips(1, model.spec.frames, 128))
    assert not [shape for shape in shapes if shape[-2:] == (tokens, tokens)]
    assert any(tokens in shape for shape in shapes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less(family: str, drop_path: float) -> None:
    gradients, elements = [], []
    for choice in ("off", "on"):
        config = ModelConfig(f"{family}-tiny", drop_path=drop_path, head_init_scale=1.0, activation_checkpointing=choice)
        model = build_model(config, CLASSES)
        assert model.checkpointed == (choice == "on")
        video = clips(3, model.spec.frames, 64)
        elements.append(sum(torch.Size(shape).numel() for shape in kept(model, video)))
        torch.manual_seed(5)
        F.cross_entropy(model(video), torch.tensor([0, 1, 1])).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert elements[1] < elements[0] / 3
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=0, atol=1e-7, msg=key)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_can_be_switched_off_again(family: str) -> None:
    model = build_model(ModelConfig(f"{family}-tiny"), CLASSES)
    video = clips(1, model.spec.frames, 64)
    before = kept(model, video)
    model.checkpoint_activations(True)
    assert len(kept(model, video)) < len(before)
    model.checkpoint_activations(False)
    assert kept(model, video) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channel", ["none", "channel"])
def test_activation_checkpointing_of_a_frozen_model_keeps_less_and_gives_the_same_gradients(family: str, channel: Any) -> None:
    """Its layers are in evaluation mode, in which transformers' own checkpointing keeps everything."""
    gradients, elements = [], []
    for choice in ("off", "on"):
        config = ModelConfig(f"{family}-tiny", freeze=True, use_keypoints=channel, drop_path=0.5, head_init_scale=1.0, activation_checkpointing=choice)
        model = build_model(config, CLASSES)
        video = clips(3, model.spec.frames, 64)
        model.train()
        elements.append(sum(torch.Size(shape).numel() for shape in kept(model, video)))
        F.cross_entropy(model(video), torch.tensor([0, 1, 1])).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None})
        inside = [module for layer in model.layers for module in layer.modules() if module is not layer]
        assert not any(module.training for module in inside)
        assert not any(module.training for module in model.eval().modules())
    assert elements[1] < elements[0] / 3 if channel == "channel" else elements[1] == elements[0]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == (3 if channel == "channel" else 2)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=0, atol=1e-7, msg=key)
    model.train().checkpoint_activations(False)
    assert model.training and not any(layer.training for layer in model.layers)
