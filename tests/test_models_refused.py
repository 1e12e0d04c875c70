"""What does not fit is refused, in one line that names the thing, what was expected and what was found."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

from clips.errors import InputError
from models import ModelConfig, build_model, load_trained
from tests.making_models import CLASSES, PROCESSOR, edit, plain_model, save_tensors, write_checkpoint


def build(name: Path | str) -> Any:  # Any: attributes differ by model
    return build_model(ModelConfig(str(name)), CLASSES)


KEY = "timesformer.encoder.layer.1.output.dense.bias"
BAD_TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({KEY: None}, rf"1 missing: {KEY}"),
    "unexpected": ({"timesformer.extra": torch.zeros(1)}, r"1 unexpected: timesformer\.extra"),
    "misshapen": ({"timesformer.embeddings.time_embeddings": torch.zeros(1, 9, 48)}, r"time_embeddings is \(1, 9, 48\), expected \(1, 4, 48\)"),
    "nan": ({KEY: torch.full((48,), float("nan"))}, rf"1 not finite: {KEY}"),
    "many": ({f"timesformer.extra.{k}": torch.zeros(1) for k in range(9)}, "9 unexpected: .* and 5 more"),
}


@pytest.mark.parametrize("wrong", BAD_TENSORS)
@pytest.mark.parametrize("trained", [False, True])
def test_every_key_but_the_new_heads_must_fit(wrong: str, trained: bool, tmp_path: Path) -> None:
    change, message = BAD_TENSORS[wrong]
    folder = write_checkpoint(tmp_path, plain_model("timesformer"))
    save_tensors(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        _ = load_trained(folder) if trained else build(folder)
    assert str(tmp_path) in str(caught.value)


def test_a_trained_head_must_be_whole(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, plain_model("timesformer"))
    save_tensors(folder, {"classifier.bias": None})
    build(folder)
    with pytest.raises(InputError, match=r"1 missing: classifier\.bias"):
        load_trained(folder)


def test_a_bias_in_two_spellings_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, plain_model("videomae"))
    save_tensors(folder, {"videomae.encoder.layer.0.attention.attention.query.bias": torch.zeros(48)})
    with pytest.raises(InputError, match="two spellings"):
        build(folder)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"model_type": "vivit"}, "model_type 'vivit'; expected one of videomae, timesformer"),
    "no type": ({"model_type": None}, "model_type None"),
    "kind of a value": ({"hidden_size": "48"}, "does not describe a TimeSformer"),
    "oblong": ({"image_size": [32, 48]}, "image_size 32x48, expected a square"),
    "attention": ({"attention_type": "space_only"}, "space_only"),
    "channels": ({"num_channels": 4}, "4 channels; expected 3"),
    "patches": ({"image_size": 40}, "4 frames of 40x40 do not divide into patches of 1x16x16"),
    "heads": ({"num_attention_heads": 5}, "does not divide into 5 heads"),
}


@pytest.mark.parametrize("wrong", BAD_CONFIGS)
def test_a_config_that_our_models_do_not_take_is_refused(wrong: str, tmp_path: Path) -> None:
    values, message = BAD_CONFIGS[wrong]
    folder = write_checkpoint(tmp_path, plain_model("timesformer"))
    edit(folder, **values)
    with pytest.raises(InputError, match=message):
        build(folder)


def test_frames_that_tubelets_would_cut_off_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, plain_model("videomae"))
    edit(folder, num_frames=39)
    with pytest.raises(InputError, match="39 frames of 32x32 do not divide into patches of 2x16x16"):
        build(folder)


BAD_PROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "mean": ({"image_mean": [124, 116, 104]}, "image_mean is .* Give --mean"),
    "scalar": ({"image_std": 0.5}, "image_std is 0.5"),
    "order": ({"channel_order": "gbr"}, "channel_order is 'gbr'; expected rgb or bgr"),
    "rescale": ({"rescale_factor": 1 / 127.5}, "expected pixels / 255"),
    "not normalised": ({"do_normalize": False}, "do_normalize False"),
}


@pytest.mark.parametrize("wrong", BAD_PROCESSORS)
def test_a_processor_that_the_patch_embedding_cannot_fold_is_refused(wrong: str, tmp_path: Path) -> None:
    values, message = BAD_PROCESSORS[wrong]
    folder = write_checkpoint(tmp_path, plain_model("videomae"), processor={**PROCESSOR, **values})
    with pytest.raises(InputError, match=message):
        build(folder)
    build_model(ModelConfig(str(folder), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), channel_order="rgb"), CLASSES)


def no_hub(*_: Any, **__: Any) -> None:  # Any: the hub's own arguments
    raise ConnectionError("no route to host")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("videomea", r"expected one of videomae, .* Did you mean videomae\?"),
        ("./nowhere", "no such file or folder"),
        ("weights.pt", "no such file or folder"),
        ("MCG-NJU/videomae-base-ssv2", "run python -m models fetch MCG-NJU/videomae-base-ssv2 on a login node"),
        ("videomae", "no route to host.* run python -m models fetch MCG-NJU/videomae-base-finetuned-ssv2"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_to_go(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_hub)
    with pytest.raises(InputError, match=message) as caught:
        build(name)
    assert "\n" not in str(caught.value)


class Harmful:
    """What weights_only keeps from running."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, ("harm",)


@pytest.mark.parametrize("content", ["pickle", "text", "list", "no tensors", "empty", "foreign keys"])
def test_a_file_that_is_no_state_dict_is_refused_and_its_pickles_stay_shut(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pt"
    contents = {"list": [1], "no tensors": {"a": 1}, "empty": {}, "foreign keys": {"blocks.0.attn.qkv.weight": torch.zeros(2)}}
    if content == "pickle":
        file.write_bytes(pickle.dumps(Harmful(), protocol=2))
    elif content == "text":
        file.write_text("no weights here")
    else:
        torch.save(contents[content], file)
    with pytest.raises(InputError, match="expected transformers' key names" if content == "foreign keys" else r"(?i)expected a state dict"):
        build(file)
    assert not (tmp_path / "harm").exists()


def test_a_run_folder_in_place_of_its_best_is_pointed_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "best", plain_model("timesformer"))
    with pytest.raises(InputError, match=r"Did you mean .*best\?"):
        build(tmp_path)


def test_a_broken_config_names_its_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, plain_model("timesformer"))
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match=r"config\.json: not readable as JSON"):
        build(folder)


def test_a_cut_off_weights_file_is_refused(tmp_path: Path) -> None:
    for weights in ("model.safetensors", "pytorch_model.bin"):
        file = write_checkpoint(tmp_path / weights, plain_model("timesformer"), weights=weights) / weights
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(InputError, match="not readable as a file of tensors"):
            build(file.parent)


def test_class_names_must_differ_and_a_saved_head_must_match_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="each once"):
        build_model(ModelConfig("videomae-tiny"), ["a", "a"])
    with pytest.raises(InputError, match="at least one"):
        build_model(ModelConfig("videomae-tiny"), [])
    with pytest.raises(ValueError, match="3 class names for a head of 2"):
        build_model(ModelConfig("videomae-tiny"), CLASSES).save(tmp_path, ["a", "b", "c"])


@pytest.mark.parametrize("names", [None, {"1": "a", "2": "b"}, {}])
def test_a_trained_folder_must_number_its_classes(names: dict[str, str] | None, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, plain_model("timesformer", 2))
    edit(folder, id2label=names)
    with pytest.raises(InputError, match="no id2label"):
        load_trained(folder)
    with pytest.raises(InputError, match="no such folder"):
        load_trained(tmp_path / "nowhere")


@pytest.mark.parametrize(("flag", "value"), [("mean", (124.0, 116.0, 104.0)), ("std", (0.0, 0.2, 0.2)), ("channel_order", "gbr"), ("model_name", " ")])
def test_flags_out_of_range_are_named(flag: str, value: Any) -> None:  # Any: wrong values on purpose
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')}"):
        ModelConfig(**{"model_name": "videomae", flag: value})
