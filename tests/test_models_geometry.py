"""Other frames and sizes than the checkpoint's own: what is asked for, and where positions go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TimesformerForVideoClassification, VideoMAEForVideoClassification

from clips.clip import ClipSpec
from clips.command import parse
from clips.errors import InputError
from models import ModelConfig, build_model, load_trained
from models.geometry import Patch, resolve_geometry
from models.keys import HEAD, KEY_BIAS
from models.positions import resize_grid, sincos_table
from tests.making_models import CLASSES, FAMILIES, PROCESSOR, clips, draw, edit, normalised, plain_logits, plain_model, write_checkpoint

PLAIN: dict[str, Any] = {"videomae": VideoMAEForVideoClassification, "timesformer": TimesformerForVideoClassification}
ORDERS = {"videomae": "rgb", "timesformer": "bgr"}
STORED = ClipSpec(39, 320, 320)
TUBELETS, SINGLE = Patch(2, 16, 16), Patch(1, 16, 16)


def build(folder: Path, source: ClipSpec | None = None, **flags: Any) -> Any:  # Any: values of flags; attributes differ by model
    return build_model(ModelConfig(str(folder), **flags), CLASSES, source).eval()


@pytest.mark.parametrize(
    ("flags", "patch", "expected"),
    [
        ({}, TUBELETS, (16, 224, 224)),
        ({"geometry": "full"}, TUBELETS, (40, 320, 320)),
        ({"geometry": "full"}, SINGLE, (39, 320, 320)),
        ({"frames": "all"}, TUBELETS, (40, 224, 224)),
        ({"frames": 38}, TUBELETS, (38, 224, 224)),
        ({"size": 320}, TUBELETS, (16, 320, 320)),
        ({"geometry": "full", "frames": 20}, TUBELETS, (20, 320, 320)),
        ({"geometry": "full", "size": 224}, SINGLE, (39, 224, 224)),
        ({"frames": 8, "size": 16}, SINGLE, (8, 16, 16)),
    ],
)
def test_the_flags_give_the_geometry(flags: dict[str, Any], patch: Patch, expected: tuple[int, int, int]) -> None:
    assert resolve_geometry(ModelConfig("x", **flags), ClipSpec(16, 224, 224), STORED, patch) == ClipSpec(*expected)


@pytest.mark.parametrize(
    ("flags", "source", "message"),
    [
        ({"frames": 39}, STORED, r"--frames 39: expected a multiple of 2, .* Give --frames 38 or 40"),
        ({"frames": 1}, STORED, r"Give --frames 2\."),
        ({"size": 250}, STORED, r"--size 250: expected a multiple of 16, .* found 250x250. Give --size 240 or 256"),
        ({"geometry": "full"}, ClipSpec(39, 320, 250), r"--geometry full: expected a multiple of 16, .* found 320x250"),
    ],
)
def test_what_does_not_divide_into_patches_is_refused_with_the_nearest_that_does(flags: dict[str, Any], source: ClipSpec, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_geometry(ModelConfig("x", **flags), ClipSpec(16, 224, 224), source, TUBELETS)


@pytest.mark.parametrize(
    ("frames", "stored", "patch", "most"),
    [(400, 39, TUBELETS, 40), (42, 39, TUBELETS, 40), (40, 39, SINGLE, 39), (18, 10, TUBELETS, 10)],
)
def test_more_frames_than_are_stored_are_refused_with_the_most_there_are(frames: int, stored: int, patch: Patch, most: int) -> None:
    with pytest.raises(InputError, match=rf"--frames {frames}: a clip has {stored} stored frames, .* Give at most {most}, as --frames all does"):
        resolve_geometry(ModelConfig("x", frames=frames), ClipSpec(16, 224, 224), ClipSpec(stored, 320, 320), patch)


@pytest.mark.parametrize(("frames", "stored"), [(40, 39), (16, 10), (10, 10)])  # a last tubelet filled up, and the checkpoint's own 16
def test_frames_that_fill_the_last_tubelet_or_are_the_checkpoints_own_may_be_asked_for(frames: int, stored: int) -> None:
    spec = resolve_geometry(ModelConfig("x", frames=frames), ClipSpec(16, 224, 224), ClipSpec(stored, 224, 224), TUBELETS)
    assert spec == ClipSpec(frames, 224, 224)
    assert resolve_geometry(ModelConfig("x", frames=400), ClipSpec(16, 224, 224), None, TUBELETS).frames == 400  # no data: nothing to compare with


def test_the_stored_geometry_must_be_told() -> None:
    with pytest.raises(ValueError, match="give build_model its source"):
        build_model(ModelConfig("videomae-tiny", geometry="full"), CLASSES)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("frames", 0), ("frames", "most"), ("size", 0), ("geometry", "half"), ("sampling", "random")),
        *(("use_keypoints", "yes"), ("activation_checkpointing", "no")),
    ],
)
def test_a_wrong_value_is_named(flag: str, value: Any) -> None:  # Any: wrong values on purpose
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} {value}"):
        ModelConfig("x", **{flag: value})


def test_the_command_line_takes_all_of_them() -> None:
    words = ["--model-name", "x", "--geometry", "full", "--frames", "all", "--size", "320", "--sampling", "dense", "--freeze", "--drop-path", "0.1"]
    config = parse(ModelConfig, "test", "", words)
    assert config == ModelConfig("x", geometry="full", frames="all", size=320, sampling="dense", freeze=True, drop_path=0.1)
    assert parse(ModelConfig, "test", "", ["--model-name", "x", "--frames", "20"]).frames == 20


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_take_all_stored_frames_and_pixels(family: str) -> None:
    model = build_model(ModelConfig(f"{family}-tiny", geometry="full"), CLASSES, ClipSpec(5, 32, 32))
    frames = {"videomae": 6, "timesformer": 5}[family]
    assert model.spec == ClipSpec(frames, 32, 32)
    assert bool(torch.isfinite(model(clips(2, frames))).all())
    assert ("frames: 5 are stored, the model takes 6: the last is repeated" in "\n".join(model.describe())) == (family == "videomae")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoints_own_geometry_changes_no_number(family: str, tmp_path: Path) -> None:
    plain: Any = plain_model(family)  # Any: as above
    folder = write_checkpoint(tmp_path, plain)
    model = build(folder, ClipSpec(4, 32, 32), geometry="full")
    state = {key: tensor for key, tensor in plain.state_dict().items() if not key.startswith(HEAD) and not key.endswith(KEY_BIAS)}
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert model.cautions() == [] and "interpolated" not in "\n".join(model.describe())
    if family == "videomae":
        assert torch.equal(model.videomae.embeddings.position_embeddings, plain.videomae.embeddings.position_embeddings)


def in_space_then_time(codes: Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> Tensor:
    """VideoMAE v2's interpolation as its authors write it: each time's picture, then each place's times."""
    pictures = codes.reshape(old[0], old[1], old[2], -1).permute(0, 3, 1, 2)
    pictures = torch.cat([F.interpolate(picture[None], size=new[1:], mode="bicubic", align_corners=False) for picture in pictures])
    times = pictures.permute(2, 3, 1, 0).reshape(new[1] * new[2], codes.shape[-1], old[0])
    times = F.interpolate(times, size=new[0], mode="linear", align_corners=False)
    return times.permute(2, 0, 1).reshape(1, -1, codes.shape[-1])


@pytest.mark.parametrize("new", [(4, 5, 6), (2, 4, 6), (1, 2, 2), (3, 3, 4)])
def test_codes_are_interpolated_as_videomaes_authors_do(new: tuple[int, int, int]) -> None:
    codes = torch.randn(1, 24, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_grid(codes, (2, 3, 4), new), in_space_then_time(codes, (2, 3, 4), new), rtol=0, atol=1e-5)


def true_places(old: tuple[int, int, int], new: tuple[int, int, int]) -> list[set[int]]:
    """For each token of the new grid the flat places of the old one that are nearest to it; halfway there are several."""
    axes = []
    for before, after in zip(old, new, strict=True):
        distances = [[abs((k + 0.5) / before - (j + 0.5) / after) for k in range(before)] for j in range(after)]
        axes.append([{k for k, distance in enumerate(row) if distance < min(row) + 1e-9} for row in distances])
    return [{(t * old[1] + h) * old[2] + w for t in times for h in down for w in across} for times in axes[0] for down in axes[1] for across in axes[2]]


def placement(codes: Tensor, resized: Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> float:
    """The share of tokens whose code is, by cosine, nearest to that of their true place."""
    nearest = (F.normalize(resized[0], dim=-1) @ F.normalize(codes[0], dim=-1).T).argmax(1).tolist()
    return sum(place in places for place, places in zip(nearest, true_places(old, new), strict=True)) / len(nearest)


def test_nine_of_ten_tokens_carry_the_code_of_their_place_at_full_geometry() -> None:
    old, new = (8, 14, 14), (20, 20, 20)
    codes = sincos_table(1568, 768)
    assert placement(codes, resize_grid(codes, old, new), old, new) >= 0.9
    assert placement(codes, sincos_table(8000, 768), old, new) < 0.01  # what transformers does


def test_nine_of_ten_of_timesformers_places_and_times_stay_where_they_were(tmp_path: Path) -> None:
    plain: Any = plain_model("timesformer", image_size=128, num_frames=8)  # Any: as above
    model = build(write_checkpoint(tmp_path, plain), frames=16, size=192)
    before, after = plain.timesformer.embeddings, model.timesformer.embeddings
    assert placement(before.position_embeddings[:, 1:], after.position_embeddings[:, 1:], (1, 8, 8), (1, 12, 12)) >= 0.9
    assert placement(before.time_embeddings, after.time_embeddings, (8, 1, 1), (16, 1, 1)) >= 0.9
    assert torch.equal(before.position_embeddings[:, 0], after.position_embeddings[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flags", [{"frames": 6, "size": 64}, {"frames": 2}, {"size": 16}])
def test_an_adapted_model_equals_plain_transformers_with_the_same_positions_and_reloads_exactly(family: str, flags: dict[str, Any], tmp_path: Path) -> None:
    model = build(write_checkpoint(tmp_path / "start", plain_model(family)), **flags)
    draw(model.classifier, 1)
    spec = model.spec
    assert spec == ClipSpec(flags.get("frames", 4), flags.get("size", 32), flags.get("size", 32))
    for tensor in (*model.parameters(), *model.buffers()):
        assert float(tensor.detach().abs().max()) < 10
    video = clips(2, spec.frames, spec.height)
    found = model(video)
    model.save(tmp_path / "best", CLASSES)
    again, _ = load_trained(tmp_path / "best")
    assert again.spec == spec and torch.equal(again(video), found)

    plain = PLAIN[family].from_pretrained(tmp_path / "best").eval()
    if family == "videomae":  # the table is not among the weights: plain transformers makes it anew, and is told the right one here
        old, new = (2, 2, 2), (spec.frames // 2, spec.height // 16, spec.width // 16)
        plain.videomae.embeddings.position_embeddings = in_space_then_time(sincos_table(8, 48), old, new)
    with torch.no_grad():
        expected = plain(normalised(video, PROCESSOR["image_mean"], PROCESSOR["image_std"], ORDERS[family])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert "geometry differs from the checkpoint's 4x32x32" in "\n".join(model.describe())


def test_an_adapted_videomae_says_that_plain_transformers_misplaces_it(tmp_path: Path) -> None:
    model = build(write_checkpoint(tmp_path / "start", plain_model("videomae")), size=64)
    draw(model.classifier, 1)
    model.save(tmp_path / "best", CLASSES)
    for text in ((tmp_path / "best" / "README.md").read_text(), "\n".join(model.describe())):
        assert "interpolated from a grid of 2x2x2 tokens; plain transformers makes the table of positions anew and so misplaces" in text
    assert json.loads((tmp_path / "best" / "config.json").read_text())["position_grid"] == [2, 2, 2]
    plain, video = VideoMAEForVideoClassification.from_pretrained(tmp_path / "best").eval(), clips(2, 4, 64)
    assert float((plain_logits(plain, video) - model(video)).detach().abs().max()) > 1e-2


def test_a_second_adaptation_starts_from_the_pretrained_table(tmp_path: Path) -> None:
    start = write_checkpoint(tmp_path / "start", plain_model("videomae"))
    build(start, frames=8, size=64).save(tmp_path / "first", CLASSES)
    second = build(tmp_path / "first", frames=6, size=48)
    assert torch.equal(second.videomae.embeddings.position_embeddings, build(start, frames=6, size=48).videomae.embeddings.position_embeddings)
    back = build(tmp_path / "first", frames=4, size=32)
    assert torch.equal(back.videomae.embeddings.position_embeddings, sincos_table(8, 48)) and back.cautions() == []
    back.save(tmp_path / "back", CLASSES)
    assert "position_grid" not in json.loads((tmp_path / "back" / "config.json").read_text())
    third, _ = load_trained(tmp_path / "first")
    assert third.spec == ClipSpec(8, 64, 64)


def test_oblong_clips_are_for_videomae_alone(tmp_path: Path) -> None:
    source = ClipSpec(4, 48, 64)
    model = build(write_checkpoint(tmp_path / "v", plain_model("videomae")), source, geometry="full")
    video = torch.randint(0, 256, (1, *source.video_shape), dtype=torch.uint8)
    model.save(tmp_path / "best", CLASSES)
    again, _ = load_trained(tmp_path / "best")
    assert again.spec == source and torch.equal(again(video), model(video))
    with pytest.raises(InputError, match=r"TimeSformer takes square frames; found 4x48x64. Give --size 48"):
        build(write_checkpoint(tmp_path / "t", plain_model("timesformer")), source, geometry="full")


@pytest.mark.parametrize("grid", [[2, 2], "2x2x2", [2, 2, 0], [2.0, 2, 2]])
def test_a_broken_position_grid_is_refused(grid: object, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, plain_model("videomae"))
    edit(folder, position_grid=grid)
    with pytest.raises(InputError, match="position_grid"):
        build(folder)


def test_sampling_is_remembered_by_a_saved_folder_and_overridden_by_its_flag(tmp_path: Path) -> None:
    start = write_checkpoint(tmp_path / "start", plain_model("videomae"))
    assert build(start).sampling == "uniform"
    build(start, sampling="dense").save(tmp_path / "best", CLASSES)
    assert load_trained(tmp_path / "best")[0].sampling == "dense"
    assert build(tmp_path / "best").sampling == "dense" and build(tmp_path / "best", sampling="centre").sampling == "centre"
    path = tmp_path / "best" / "preprocessor_config.json"
    path.write_text(path.read_text().replace("dense", "dance"))
    with pytest.raises(InputError, match="frame_sampling is 'dance'"):
        load_trained(tmp_path / "best")
