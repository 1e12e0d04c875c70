"""How a model is fine-tuned: drop path, the head, frozen layers, the keypoints' channel, compiling, depths of parameters."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn
from transformers import TimesformerForVideoClassification, VideoMAEForVideoClassification

from clips.errors import InputError
from models import ModelConfig, build_model, load_trained
from models.build import check_torch
from models.drop_path import DropPath, drop_rates
from models.keys import KEYPOINTS
from tests.making_models import CLASSES, FAMILIES, NUM_FRAMES, clips, draw, edit, plain_model, write_checkpoint

PLAIN: dict[str, Any] = {"videomae": VideoMAEForVideoClassification, "timesformer": TimesformerForVideoClassification}

compiles = pytest.mark.skipif(Version(torch.__version__) < Version("2.11"), reason="--compile is refused")


def build(folder: Path, **flags: Any) -> Any:  # Any: values of flags; attributes differ by model
    return build_model(ModelConfig(str(folder), **{"head_init_scale": 1.0, **flags}), CLASSES)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / request.param, plain_model(request.param))


def joints(num: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 2, (num, NUM_FRAMES, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_rates_rise_linearly_from_nothing_to_the_last() -> None:
    assert drop_rates(0.1, 12) == pytest.approx(torch.linspace(0, 0.1, 12).tolist(), abs=1e-8)
    assert drop_rates(0.1, 1) == [0.0]


def test_a_branch_is_dropped_for_whole_clips_and_its_mean_is_kept() -> None:
    branch, drop = torch.rand(3000, 2, 5) + 1, DropPath(0.25, rows=3)
    torch.manual_seed(0)
    factors = (drop(branch) / branch).reshape(1000, -1)
    assert torch.allclose(factors, factors[:, :1])
    assert sorted(set(factors[:, 0].round(decimals=4).tolist())) == pytest.approx([0, 4 / 3], abs=1e-4)
    assert float(factors[:, 0].mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(branch), branch)


def test_drop_path_changes_no_key_and_nothing_in_evaluation(folder: Path) -> None:
    without, model, video = build(folder).eval(), build(folder, drop_path=0.5), clips()
    assert model.state_dict().keys() == without.state_dict().keys()
    torch.manual_seed(1)
    first = model(video)
    assert not torch.equal(model(video), first)
    torch.manual_seed(1)
    assert torch.equal(model(video), first), "its chance is that of torch's global generator"
    assert torch.equal(model.eval()(video), without(video))


def test_the_first_layer_is_never_dropped_and_a_rate_near_one_makes_the_last_the_identity(folder: Path) -> None:
    model = build(folder, drop_path=1 - 1e-12)
    first, last = model.layers
    tokens = {"videomae": 8, "timesformer": 17}[folder.name]
    hidden = torch.randn(3, tokens, 48)
    outputs = [layer(hidden) for layer in (first, last)]
    outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
    assert float((outputs[0] - hidden).detach().abs().max()) > 0.1
    assert torch.equal(outputs[1], hidden)


def test_drop_path_keeps_the_dropout_that_a_checkpoint_brings(folder: Path) -> None:
    edit(folder, hidden_dropout_prob=0.3)
    model = build(folder, drop_path=0.5)
    kinds = [type(module).__name__ for module in model.layers[-1].modules()]
    assert kinds.count("DropPath") == {"videomae": 2, "timesformer": 3}[folder.name]
    assert [module.p for module in model.layers[-1].output.modules() if isinstance(module, nn.Dropout)] == [0.3]


def test_the_head_starts_at_the_classes_shares(folder: Path) -> None:
    model = build(folder, head_init_scale=0.001).eval()
    model.set_head_prior([900, 100])
    torch.testing.assert_close(model(clips()).softmax(-1), torch.tensor([[0.9, 0.1]] * 2), rtol=0, atol=2e-3)
    model.set_head_prior([9, 0])
    assert model.classifier.bias.tolist() == pytest.approx(torch.tensor([0.9, 0.1]).log().tolist())
    for wrong in ([1], [1, -1], [1, 2, 3]):
        with pytest.raises(ValueError, match="expected 2 numbers"):
            model.set_head_prior(wrong)


@pytest.mark.parametrize("channel", ["none", "channel"])
def test_a_frozen_model_trains_its_head_and_channel_alone_and_drops_nothing(folder: Path, channel: str) -> None:
    edit(folder, hidden_dropout_prob=0.5)
    model = build(folder, freeze=True, drop_path=0.5, use_keypoints=channel, keypoints_dropout=0.0)
    model.train()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"classifier.weight", "classifier.bias"} | ({f"{folder.name}{KEYPOINTS}"} if channel == "channel" else set())
    assert trained == expected
    assert model.training and model.classifier.training and not any(layer.training for layer in model.layers)
    given = (clips(), joints()) if channel == "channel" else (clips(),)
    assert torch.equal(model(*given), model(*given))
    F.cross_entropy(model(*given), torch.tensor([0, 1])).backward()
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == expected
    assert "frozen: all but the head" in "\n".join(model.describe())
    model.eval()
    assert not model.training and not model.classifier.training


def test_the_new_channel_changes_no_bit_at_the_start_and_learns(folder: Path) -> None:
    without, model = build(folder).eval(), build(folder, use_keypoints="channel").eval()
    video = clips()
    assert model.uses_keypoints and not without.uses_keypoints
    assert torch.equal(model(video, joints()), without(video)) and torch.equal(model(video), without(video))
    F.cross_entropy(model(video, joints()), torch.tensor([0, 1])).backward()
    assert float(model.projection.keypoint_weight.grad.abs().max()) > 1e-5 and without.projection.keypoint_weight is None
    assert set(model.state_dict()) - set(without.state_dict()) == {f"{folder.name}{KEYPOINTS}"}


def test_each_joint_adds_its_own_weight_to_its_own_token(folder: Path) -> None:
    model = build(folder, use_keypoints="channel").eval()
    draw(model.projection, 1)
    mask = torch.zeros(1, NUM_FRAMES, 32, 32, dtype=torch.uint8)
    mask[0, 3, 5, 20] = 1
    video = clips(1)
    added = (model.projection(video, mask) - model.projection(video))[0]
    tubelet = {"videomae": 2, "timesformer": 1}[folder.name]
    token = (3 // tubelet) * 4 + 0 * 2 + 1
    torch.testing.assert_close(added[token], model.projection.keypoint_weight[:, 3 % tubelet, 5, 4], rtol=0, atol=1e-5)
    assert not added[torch.arange(len(added)) != token].any()


def test_joints_are_hidden_for_whole_clips_in_training_alone(folder: Path) -> None:
    model = build(folder, use_keypoints="channel", keypoints_dropout=0.3)
    video, mask = clips(1).expand(400, -1, -1, -1, -1), torch.ones(400, NUM_FRAMES, 32, 32, dtype=torch.uint8)
    torch.manual_seed(0)
    shown = model._shown(video, mask).flatten(1).float().mean(1)
    assert set(shown.tolist()) == {0.0, 1.0} and float(shown.mean()) == pytest.approx(0.7, abs=0.07)
    model.eval()
    assert model._shown(video, mask) is mask and model._shown(video, None) is None


def test_a_channel_without_joints_still_has_a_gradient_so_that_ranks_agree(folder: Path) -> None:
    model = build(folder, use_keypoints="channel")
    model(clips()).sum().backward()
    assert model.projection.keypoint_weight.grad is not None


def test_a_trained_channel_is_saved_read_back_and_left_out_where_it_is_not_asked_for(folder: Path, tmp_path: Path) -> None:
    model = build(folder, use_keypoints="channel").eval()
    draw(model, 1)
    model.save(tmp_path / "best", CLASSES)
    again, _ = load_trained(tmp_path / "best")
    video, mask = clips(), joints()
    assert again.uses_keypoints and torch.equal(again(video, mask), model(video, mask)) and not torch.equal(again(video), model(video, mask))
    kept, left_out = build(tmp_path / "best", use_keypoints="channel"), build(tmp_path / "best")
    assert torch.equal(kept.projection.keypoint_weight, model.projection.keypoint_weight)
    assert "left out the keypoints' channel" in "\n".join(left_out.describe()) and not left_out.uses_keypoints
    assert "plain transformers does not know the joints' channel" in (tmp_path / "best" / "README.md").read_text()
    plain = PLAIN[folder.name].from_pretrained(tmp_path / "best")
    assert {f"{folder.name}{KEYPOINTS}"} == set(again.state_dict()) - set(plain.state_dict())


@pytest.mark.parametrize(
    ("flags", "mask", "message"),
    [
        ({}, joints(), "built without --use-keypoints channel"),
        ({"use_keypoints": "channel"}, joints().float(), r"expected uint8 \(2, 4, 32, 32\) of 0 and 1; found torch.float32"),
        ({"use_keypoints": "channel"}, joints(1), r"found torch.uint8 \(1, 4, 32, 32\)"),
    ],
)
def test_joints_of_another_kind_are_refused(folder: Path, flags: dict[str, Any], mask: torch.Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build(folder, **flags)(clips(), mask)


@pytest.mark.parametrize(("flag", "value"), [("keypoints_dropout", 1.1), ("drop_path", 1.0), ("drop_path", -0.1), ("head_init_scale", 0.0)])
def test_shares_out_of_range_are_named(flag: str, value: float) -> None:
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} {value}"):
        ModelConfig("x", **{flag: value})  # type: ignore[arg-type]  # a field's name and value


@compiles
def test_compiling_in_one_graph_changes_neither_keys_nor_logits_nor_gradients(folder: Path) -> None:
    plain, model = build(folder, use_keypoints="channel"), build(folder, use_keypoints="channel")
    model.compile(backend="eager", fullgraph=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for one in (plain, model):
        torch.manual_seed(0)
        one(clips(), joints()).sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(key).grad, rtol=1e-4, atol=1e-5, msg=key)
    torch.testing.assert_close(model.eval()(clips()), plain.eval()(clips()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("version", "is_refused"), [("2.6.0", True), ("2.10.1+cu128", True), ("2.11.0", False), ("2.13.0+cpu", False), ("3.0.0a0+git", False)])
def test_a_torch_that_cannot_compile_is_refused(version: str, is_refused: bool) -> None:
    with pytest.raises(InputError, match=f"--compile: needs torch 2.11 or newer, found {re.escape(version)}") if is_refused else nullcontext():
        check_torch(version)


@compiles
def test_the_flag_compiles_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: asked.append(self))
    assert build(folder, compile=True) is asked[0] and len(asked) == 1
    build(folder)
    assert len(asked) == 1


def test_every_parameter_has_a_depth(folder: Path) -> None:
    model = build(folder, use_keypoints="channel")
    depths = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert model.num_layers == 4 and set(depths.values()) == {0, 1, 2, 3}
    ends = {name for name, depth in depths.items() if depth == 3}
    norm = {"videomae": "fc_norm", "timesformer": "timesformer.layernorm"}[folder.name]
    assert ends == {"classifier.weight", "classifier.bias", f"{norm}.weight", f"{norm}.bias", f"{folder.name}{KEYPOINTS}"}
    for name, depth in depths.items():
        assert (depth == 0) == (".embeddings." in name and name not in ends)
        assert depth in (0, 3) or f".layer.{depth - 1}." in name
