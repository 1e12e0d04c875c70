"""Checkpoints in every spelling and container load exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from transformers import TimesformerConfig, TimesformerForVideoClassification, VideoMAEConfig, VideoMAEForPreTraining

from clips.clip import ClipSpec
from clips.errors import InputError
from models import ModelConfig, build_model, load_trained
from tests.making_models import CLASSES, FAMILIES, PROCESSOR, SMALL, SPELLINGS, clips, draw, plain_logits, plain_model, spelled, write_checkpoint

ORDERS = {"videomae": "rgb", "timesformer": "bgr"}


def build(name: Path | str) -> Any:  # Any: attributes differ by model
    return build_model(ModelConfig(str(name)), CLASSES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_of_every_spelling_gives_the_logits_of_the_model_that_it_was(family: str, spelling: str, weights: str, tmp_path: Path) -> None:
    plain, video = plain_model(family), clips()
    for key, parameter in plain.named_parameters():
        if key.endswith("attention.attention.key.bias"):
            parameter.data.zero_()
    model, _ = load_trained(write_checkpoint(tmp_path, plain, spelling, weights))
    torch.testing.assert_close(model(video), plain_logits(plain, video, ORDERS[family]), rtol=0, atol=1e-5)
    written = spelled(plain.state_dict(), "in memory")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in written.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_installed_transformers_saves_is_read_exactly(family: str, tmp_path: Path) -> None:
    plain, video = plain_model(family), clips()
    plain.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model, _ = load_trained(tmp_path)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in plain.state_dict().items())
    torch.testing.assert_close(model(video), plain_logits(plain, video, ORDERS[family]), rtol=0, atol=1e-5)


def test_saved_folders_hold_no_key_bias_and_both_names_of_the_bias_flag(tmp_path: Path) -> None:
    build(write_checkpoint(tmp_path / "start", plain_model("videomae"))).save(tmp_path / "best", CLASSES)
    with safe_open(tmp_path / "best" / "model.safetensors", "pt") as file:
        biases = sorted(key.split("attention.attention.")[1] for key in file.keys() if ".layer.0." in key and ".attention.attention." in key and "bias" in key)  # noqa: SIM118
    assert biases == ["query.bias", "value.bias"]
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    assert config["qkv_bias"] is config["qv_bias"] is True


def test_a_checkpoint_without_query_and_value_biases_loads(tmp_path: Path) -> None:
    name = "qv_bias" if hasattr(VideoMAEConfig, "qv_bias") else "qkv_bias"
    plain, video = plain_model("videomae", **{name: False}), clips()
    for spelling in ("hub", "5.23"):
        model, _ = load_trained(write_checkpoint(tmp_path / spelling, plain, spelling))
        torch.testing.assert_close(model(video), plain_logits(plain, video), rtol=0, atol=1e-5)


def test_a_self_supervised_checkpoint_loses_its_decoder_and_averages_tokens(tmp_path: Path) -> None:
    decoder: dict[str, Any] = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48}
    plain = VideoMAEForPreTraining(VideoMAEConfig(**{**SMALL, **decoder, "num_frames": 4, "use_mean_pooling": False}))
    draw(plain, 0)
    model = build(write_checkpoint(tmp_path, plain))
    assert torch.equal(model.state_dict()["videomae.encoder.layer.1.output.dense.weight"], plain.state_dict()["videomae.encoder.layer.1.output.dense.weight"])
    assert model.fc_norm is not None and torch.equal(model.fc_norm.weight, torch.ones(48))
    text = "\n".join(model.describe())
    assert "dropped 21 tensors of the self-supervised decoder" in text and "fc_norm" in text
    with pytest.raises(InputError, match="has no classifier"):
        load_trained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_encoder_loads_under_a_new_head(family: str, tmp_path: Path) -> None:
    plain = plain_model(family)
    folder = write_checkpoint(tmp_path, plain)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({key.removeprefix(f"{family}."): value for key, value in tensors.items() if key.startswith(family)}, folder / "pytorch_model.bin")
    key = f"{family}.encoder.layer.1.output.dense.bias"
    assert torch.equal(build(folder).state_dict()[key], plain.state_dict()[key])


@pytest.mark.parametrize("nest", [None, "model", "state_dict", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_a_state_dict_file_loads_whatever_its_nest_and_prefix(nest: str | None, prefix: str, tmp_path: Path) -> None:
    plain = plain_model("timesformer")
    folder = write_checkpoint(tmp_path, plain)
    tensors = {f"{prefix}{key}": value for key, value in plain.state_dict().items()}
    torch.save({nest: tensors, "epoch": 3} if nest else tensors, folder / "last.pt")
    (folder / "pytorch_model.bin").unlink()
    state = build(folder / "last.pt").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items() if not key.startswith("classifier"))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lonely_state_dict_file_tells_its_architecture_and_says_what_was_assumed(family: str, suffix: str, tmp_path: Path) -> None:
    size = {"videomae": 224, "timesformer": 48}[family]
    plain = plain_model(family, image_size=size, hidden_size=64, num_attention_heads=1, num_frames={"videomae": 16, "timesformer": 5}[family])
    written = write_checkpoint(tmp_path / "folder", plain, weights="model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    file = tmp_path / f"weights{suffix}"
    shutil.copy(written / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"), file)
    model = build(file)
    assert model.spec == ClipSpec(*{"videomae": (16, 224, 224), "timesformer": (5, 48, 48)}[family])
    assert model.config.num_hidden_layers == 2 and model.config.intermediate_size == 96 and model.config.num_attention_heads == 1
    assert model.pixels.channel_order == ORDERS[family]
    text = "\n".join(model.describe())
    assert "assumed 1 heads of 64" in text and ("assumed 16 frames of 224 px" in text) == (family == "videomae")
    key = f"{family}.encoder.layer.1.output.dense.bias"
    assert torch.equal(model.state_dict()[key], plain.state_dict()[key])


def test_half_precision_checkpoints_become_float32(tmp_path: Path) -> None:
    plain = plain_model("videomae").half()
    model = build(write_checkpoint(tmp_path, plain))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.state_dict()["fc_norm.weight"], plain.state_dict()["fc_norm.weight"].float())


def test_a_config_of_timesformer_that_transformers_does_not_load_is_loaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "start", plain_model("timesformer"), drop_path_rate=0.1, image_size=[32, 32])
    build(folder).save(tmp_path / "best", CLASSES)
    assert TimesformerForVideoClassification.from_pretrained(tmp_path / "best").config.image_size == 32
    with pytest.raises(Exception, match="drop_path_rate"):
        TimesformerConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "num_labels", "order"),
    [("timesformer", 174, "bgr"), ("timesformer", 400, "rgb"), ("timesformer", 2, "rgb"), ("videomae", 174, "rgb")],
)
def test_the_channel_order_of_a_checkpoint_of_unknown_name(family: str, num_labels: int, order: str, tmp_path: Path) -> None:
    assert build(write_checkpoint(tmp_path, plain_model(family, num_labels))).pixels.channel_order == order


@pytest.mark.parametrize(
    ("hub_id", "order"),
    [
        ("facebook/timesformer-hr-finetuned-ssv2", "bgr"),
        ("fcakyon/timesformer-large-finetuned-ssv2", "bgr"),
        ("facebook/timesformer-base-finetuned-k400", "rgb"),
        ("someone/timesformer-gestures", "rgb"),
    ],
)
def test_the_channel_order_of_a_hub_checkpoint_also_by_its_path_in_the_cache(hub_id: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "0123abcd"
    write_checkpoint(folder, plain_model("timesformer", 2))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert build(hub_id).pixels.channel_order == order
    assert build(folder).pixels.channel_order == order


def test_without_a_processor_the_statistics_are_those_of_the_training_code(tmp_path: Path) -> None:
    model = build(write_checkpoint(tmp_path, plain_model("timesformer"), processor=None))
    assert model.pixels.mean == (0.45, 0.45, 0.45) and model.pixels.std == (0.225, 0.225, 0.225)
