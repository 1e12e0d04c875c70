"""Every model of the registry: its contract, and equality with plain transformers."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import TimesformerForVideoClassification, VideoMAEForVideoClassification
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from clips.clip import ClipSpec
from clips.errors import InputError
from models import MODELS, ModelConfig, build_model, load_trained
from models.classifier import ClipClassifier
from models.hub import HUB_IDS
from models.positions import sincos_table
from tests.making_models import CLASSES, FAMILIES, PROCESSOR, clips, normalised, plain_logits, plain_model, write_checkpoint

PLAIN: dict[str, Any] = {"videomae": VideoMAEForVideoClassification, "timesformer": TimesformerForVideoClassification}
ORDERS = {"videomae": "rgb", "timesformer": "bgr"}


@pytest.fixture(params=sorted(MODELS))
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each registry name; the hub's answers are small checkpoints of the same architecture and key names."""
    folders = {HUB_IDS[family]: write_checkpoint(tmp_path / f"hub-{family}", plain_model(family)) for family in FAMILIES if family == request.param}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **_: str(folders[hub_id]))
    return request.param


@pytest.fixture
def model(name: str) -> ClipClassifier:
    return build_model(ModelConfig(name), CLASSES)


def random_clips(model: ClipClassifier, num: int = 2) -> torch.Tensor:
    spec = model.spec
    return clips(num, spec.frames, spec.height)


def test_a_batch_of_bytes_gives_finite_logits_and_a_gradient_for_every_trained_parameter(model: ClipClassifier) -> None:
    logits = model(random_clips(model))
    assert logits.shape == (2, 2) and logits.dtype == torch.float32
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())), key


def test_the_state_dict_has_the_keys_and_shapes_of_plain_transformers(model: ClipClassifier) -> None:
    plain = PLAIN[model.config.model_type](copy.deepcopy(model.config))
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: value.shape for key, value in plain.state_dict().items()}
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_no_parameter_or_buffer_is_nan_or_huge(model: ClipClassifier) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        assert float(tensor.detach().abs().max()) < 10


def test_everything_that_is_drawn_is_seeded_and_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    first = build_model(ModelConfig(name), CLASSES).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(12345)
    second = build_model(ModelConfig(name), CLASSES).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("scale", "deviation"), [({}, 2e-5), ({"head_init_scale": 1.0}, 0.02)])
def test_a_new_head_is_normal_and_small_and_has_no_bias(name: str, scale: dict[str, float], deviation: float) -> None:
    model = build_model(ModelConfig(name, **scale), [f"class {k}" for k in range(50)])  # type: ignore[arg-type]  # one field's name and value
    assert float(model.get_parameter("classifier.weight").detach().std()) == pytest.approx(deviation, rel=0.1)
    assert not model.get_parameter("classifier.bias").any()


def test_a_saved_model_is_read_back_exactly_by_us_and_by_plain_transformers(model: ClipClassifier, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(torch.tensor([0.25, -0.5]))
    model.eval()
    video = random_clips(model)
    model.save(tmp_path / "best", CLASSES, {"auroc": 0.9, "epoch": 3})
    model.save(tmp_path / "best", CLASSES, {"auroc": 0.95, "epoch": 4})
    again, names = load_trained(tmp_path / "best")
    assert names == CLASSES and not again.training
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert torch.equal(again(video), model(video))
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert "auroc: 0.95" in (tmp_path / "best" / "README.md").read_text()

    plain = PLAIN[model.config.model_type].from_pretrained(tmp_path / "best").eval()
    assert plain.config.id2label == {0: "nongesture", 1: "gesture"}
    pixels = normalised(video, model.pixels.mean, model.pixels.std, model.pixels.channel_order)
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels).logits, model(video), rtol=0, atol=1e-5)


def test_the_log_tells_weights_geometry_pixels_and_head(name: str, model: ClipClassifier) -> None:
    text = "\n".join(model.describe())
    for word in (HUB_IDS.get(name, "random"), str(model.spec), "mean", "channel order", "head: new, 2 classes: nongesture, gesture"):
        assert word in text
    assert ("CC-BY-NC-4.0" in text) == (name in HUB_IDS)


def test_the_model_card_carries_the_licence_of_the_start_weights_through_two_generations(name: str, model: ClipClassifier, tmp_path: Path) -> None:
    model.save(tmp_path / "first", CLASSES)
    build_model(ModelConfig(str(tmp_path / "first")), ["a", "b", "c"]).save(tmp_path / "second", ["a", "b", "c"])
    card = (tmp_path / "second" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n") == (name in HUB_IDS)
    assert f"base_model: {HUB_IDS.get(name, 'random')}\n" in card


@pytest.mark.parametrize("wrong", ["float", "channels first", "frames", "size", "one clip"])
def test_a_batch_of_another_kind_says_what_was_expected(model: ClipClassifier, wrong: str) -> None:
    video = random_clips(model)
    batches = {
        "float": video.float(),
        "channels first": video.permute(0, 1, 4, 2, 3),
        "frames": video[:, 1:],
        "size": video[:, :, :16, :16],
        "one clip": video[0],
    }
    expected = ", ".join(map(str, model.spec.video_shape))
    with pytest.raises(TypeError if wrong == "float" else InputError, match=rf"expected uint8 \(B, {expected}\) RGB"):
        model(batches[wrong])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_plain_transformers_and_so_do_the_gradients(family: str, tmp_path: Path) -> None:
    plain, video = plain_model(family), clips()
    model, names = load_trained(write_checkpoint(tmp_path, plain))
    order = ORDERS[family]  # its 174 classes tell TimeSformer's
    assert model.spec == ClipSpec(4, 32, 32) and len(names) == 174
    expected = plain(normalised(video, PROCESSOR["image_mean"], PROCESSOR["image_std"], order)).logits
    torch.testing.assert_close(model(video), expected, rtol=0, atol=1e-5)

    labels = torch.tensor([3, 17])
    for logits in (model(video), expected):
        nn.functional.cross_entropy(logits, labels).backward()
    theirs = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-4, atol=1e-6, msg=key)
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-6, f"{key} learns from rounding noise alone"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.015), (torch.float16, 0.002)])
def test_half_precision_logits_stay_as_near_as_those_of_plain_transformers(family: str, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    plain, video = plain_model(family), clips(4)
    model, _ = load_trained(write_checkpoint(tmp_path, plain))
    exact = plain_logits(plain, video, ORDERS[family])
    with torch.autocast("cpu", dtype), torch.no_grad():
        found = model(video).float()
    assert float((found - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_the_channel_order_turns_pixels_and_a_flag_overrides_it(family: str, tmp_path: Path) -> None:
    plain, video = plain_model(family, num_labels=2), clips()
    folder = str(write_checkpoint(tmp_path, plain))
    logits = {}
    for order in ("rgb", "bgr"):
        model = build_model(ModelConfig(folder, channel_order=order), CLASSES)
        model.load_state_dict(model.state_dict() | {key: value for key, value in plain.state_dict().items() if key.startswith("classifier")})
        logits[order] = model(video)
        torch.testing.assert_close(logits[order], plain_logits(plain, video, order), rtol=0, atol=1e-5)
    assert float((logits["rgb"] - logits["bgr"]).detach().abs().max()) > 1e-3


def test_mean_and_std_flags_override_the_folder_and_are_saved(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "start", plain_model("videomae"))
    model = build_model(ModelConfig(str(folder), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), CLASSES)
    assert "mean 0.1 0.2 0.3 (--mean), std 0.5 0.6 0.7 (--std)" in "\n".join(model.describe())
    model.save(tmp_path / "best", CLASSES)
    again, _ = load_trained(tmp_path / "best")
    assert again.pixels == model.pixels
    assert torch.equal(again(clips()), model.eval()(clips()))


@pytest.mark.parametrize(("tokens", "width"), [(1, 2), (8, 48), (1568, 64)])
def test_the_table_of_positions_is_bit_equal_to_that_of_transformers(tokens: int, width: int) -> None:
    assert torch.equal(sincos_table(tokens, width), get_sinusoid_encoding_table(tokens, width))


def test_the_table_of_positions_moves_with_the_model_and_is_not_saved() -> None:
    model = build_model(ModelConfig("videomae-tiny"), CLASSES)
    buffers = {key: buffer for key, buffer in model.named_buffers() if key.endswith("position_embeddings")}
    assert torch.equal(next(iter(buffers.values())), get_sinusoid_encoding_table(128, 96))
    assert not buffers.keys() & model.state_dict().keys()


def test_the_tiny_models_start_from_the_same_numbers_under_every_transformers() -> None:
    starts = {
        "videomae-tiny": ("query.weight", [-0.0212487, 0.0265564, -0.0242205]),
        "timesformer-tiny": ("qkv.weight", [-0.0249495, -0.0095753, 0.0045355]),
    }
    for name, (ending, expected) in starts.items():
        state = build_model(ModelConfig(name), CLASSES).state_dict()
        first = state[min(key for key in state if key.endswith(ending))]
        assert first[0, :3].tolist() == pytest.approx(expected, rel=1e-4)


def test_tiny_geometry_is_that_of_the_documentation() -> None:
    assert build_model(ModelConfig("videomae-tiny"), CLASSES).spec == ClipSpec(16, 64, 64)
    assert build_model(ModelConfig("timesformer-tiny"), CLASSES).spec == ClipSpec(8, 64, 64)


def test_importing_models_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, models; print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
