"""view: the page and the picture show the clips that were packed, with their joints; the page is parsed by Python's own parser."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clips.clip import ClipSpec
from clips.errors import ClipError, InputError
from clips.manifest import read_index, read_manifest, tar_path
from convert.pack import PackConfig, pack
from convert.sheet import draw_joints, fitted
from convert.shown import resized, small_size, strip_numbers
from convert.view import ViewConfig, view
from tests.making import write_home
from tests.packing import rewrite, snippets_of, source_of, use_threads
from tests.viewing import FRAMES, GESTURES, HEIGHT, WIDTH, home_of, jpegs, keys, mask_of_page, shown, write_shards

YELLOW = (255, 230, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("viewed"))


def test_a_page_holds_the_valid_frames_and_the_masks_of_the_npz(folder: Path, tmp_path: Path) -> None:
    page = shown(folder, tmp_path / "a.html")
    assert len(page.articles) == len(page.clips) == 14 == page.tags["article"]
    valid_counts = set()
    for key, clip in zip(keys(page), page.clips, strict=True):
        source = source_of(home_of(folder), key)
        valid = 1 + max(t for t in range(FRAMES) if source["video"][t].any())
        valid_counts.add(valid)
        assert len(clip["frames"]) == len(clip["points"]) == valid
        for frame, expected in zip(jpegs(clip), source["video"], strict=False):
            assert np.abs(frame.astype(int) - expected).mean() < 4  # JPEG's loss; the next frame's red is 5 away, another clip's 37
        assert np.array_equal(mask_of_page(clip["points"], (valid, HEIGHT, WIDTH)), source["keypoints"][:valid])
    assert valid_counts == {FRAMES - 2, FRAMES}
    assert page.known == {"height": HEIGHT, "width": WIDTH, "ms_per_frame": pytest.approx(1300 / FRAMES)}


def test_each_frame_of_a_page_is_that_frame_and_no_neighbour(folder: Path, tmp_path: Path) -> None:
    page = shown(folder, tmp_path / "a.html", clips=2)
    for key, clip in zip(keys(page), page.clips, strict=True):
        video = source_of(home_of(folder), key)["video"].astype(int)
        for number, frame in enumerate(jpegs(clip)):
            distances = [np.abs(frame.mean(axis=(0, 1)) - other.mean(axis=(0, 1))).sum() for other in video]
            assert int(np.argmin(distances)) == number


def test_smaller_stored_frames_keep_points_in_source_coordinates(folder: Path, tmp_path: Path) -> None:
    page = shown(folder, tmp_path / "a.html", "small", split="val")
    assert (page.known["height"], page.known["width"]) == (HEIGHT, WIDTH)
    for key, clip in zip(keys(page), page.clips, strict=True):
        assert {frame.shape for frame in jpegs(clip)} == {(16, 20, 3)}
        source = source_of(home_of(folder), key)
        valid = len(clip["frames"])
        assert np.array_equal(mask_of_page(clip["points"], (valid, HEIGHT, WIDTH)), source["keypoints"][:valid])


def test_captions_tell_label_source_times_and_valid_frames(folder: Path, tmp_path: Path) -> None:
    page = shown(folder, tmp_path / "a.html", split="train", label="gesture")
    assert keys(page) == GESTURES
    facts = [" ".join(article.split()) for article in page.articles]
    assert all(text.startswith("gesture ") for text in facts)
    assert "train_gesture_002 · 0-1300 ms · 12 of 12 frames valid" in facts[1]
    assert "train_gesture_002 · 1300-2600 ms · 10 of 12 frames valid" in facts[2]
    assert page.title.endswith("all 3 clips of gesture in train")


def test_clips_without_keypoints_or_times_are_shown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = shown(folder, tmp_path / "a.html", "blind")
    assert [clip["points"] for clip in page.clips] == [None] * 4
    assert view(ViewConfig(folder / "blind", tmp_path / "a.png")) == 0
    assert not (np.asarray(Image.open(tmp_path / "a.png")) == YELLOW).all(axis=-1).any()
    home = write_home(tmp_path, {"val": {"a": 1}}, 3, 8, 8, name="other")
    use_threads(monkeypatch)
    pack(PackConfig(home, tmp_path / "timeless", workers=1))
    timeless = shown(tmp_path, tmp_path / "b.html", "timeless")
    assert "begin and end unknown" in timeless.articles[0]
    assert timeless.known["ms_per_frame"] == pytest.approx(33.3667, abs=1e-4)


def test_text_is_escaped_and_nothing_leads_to_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = write_home(tmp_path, {"val": {"a<b>&amp;\"'": 1, "b": 1}}, 3, 8, 8, name="<script>alert(1)<!--")
    file = snippets_of(home)[0]
    file.rename(file.with_name("000000001_<img src=x onerror=alert(2)>.npz"))
    use_threads(monkeypatch)
    pack(PackConfig(home, tmp_path / "shards", workers=1))
    page = shown(tmp_path, tmp_path / "a.html")
    assert page.title.startswith("<script>alert(1)<!--: ")
    assert page.articles[0].split()[0] == "a<b>&amp;\"'" == page.articles[0].split()[1].split("/")[1]
    assert "<img src=x onerror=alert(2)> · 0-" not in page.articles[1]
    assert "<img src=x onerror=alert(2)> · " in page.articles[0]
    assert page.tags["script"] == len(page.articles) + 2 and page.tags["img"] == 0
    assert page.addresses == []
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("http") == text.count("http-equiv") == 1
    assert "default-src 'none'; img-src data:;" in text
    assert view(ViewConfig(tmp_path / "shards", tmp_path / "a.png")) == 0  # odd letters do not stop the picture


def places(clip_in_column: int, frame_in_strip: int) -> tuple[int, int]:
    """Top and left of a frame in a picture of one column, worked out by hand: 143x179 frames, strips below their captions."""
    return 32 + 92 + clip_in_column * (30 + 143 + 22) + 30, 32 + frame_in_strip * (179 + 4)


def test_a_picture_shows_each_strip_with_its_joints(folder: Path, tmp_path: Path) -> None:
    assert view(ViewConfig(folder / "shards", tmp_path / "a.png", split="val")) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        picture = np.asarray(image)
    assert picture.shape == (32 + 92 + 4 * (30 + 143 + 22) - 22 + 32, 32 + 8 * 183 - 4 + 32, 3)
    clips = [f"val/{label}/{number:09d}_val_{label}_000" for label, numbers in (("nongesture", (0, 1)), ("gesture", (2, 3))) for number in numbers]
    for row, key in enumerate(clips):
        source = source_of(home_of(folder), key)
        valid = 1 + max(t for t in range(FRAMES) if source["video"][t].any())
        for place, number in enumerate({12: (0, 1, 3, 4, 6, 7, 9, 11), 10: (0, 1, 2, 3, 5, 6, 7, 9)}[valid]):
            top, left = places(row, place)
            cell = picture[top : top + 143, left : left + 179].astype(int)
            joints = np.argwhere(source["keypoints"][number]) + 0.5
            far = np.ones((143, 179), bool)
            far[118:, :30] = False  # the frame's number stands there
            for y, x in joints * (143 / 32, 179 / 40):
                rows, columns = np.ogrid[:143, :179]
                far &= np.hypot(rows + 0.5 - y, columns + 0.5 - x) > 4.5
                if not (y > 115 and x < 34):
                    assert tuple(cell[int(y), int(x)]) == YELLOW
            expected = source["video"][number].astype(int)[(np.arange(143) * 32 // 143)][:, np.arange(179) * 40 // 179]
            assert far.any() and np.abs(cell - expected)[far].max() <= 9  # red is a frame's own; green and blue rise by 8 and 7 a pixel
            assert (cell[far][:, 0] == expected[0, 0, 0]).all()


def test_a_joint_is_visible_on_white_and_on_black(tmp_path: Path) -> None:
    for ground in (0, 255):
        drawn = draw_joints(np.full((41, 41, 3), ground, np.uint8), np.array([[20, 20]], np.uint16), (41, 41))
        assert tuple(drawn[20, 20]) == YELLOW
        assert max(drawn[20, 23]) < 32  # the rim: nine tenths black
        assert tuple(drawn[20, 26]) == (ground,) * 3 == tuple(drawn[0, 0])
        assert np.array_equal(drawn, drawn[::-1]) and np.array_equal(drawn, drawn[:, ::-1])


def test_joints_stand_at_their_share_of_the_source() -> None:
    drawn = draw_joints(np.zeros((20, 80, 3), np.uint8), np.array([[7, 2]], np.uint16), (10, 10))
    rows, columns = np.nonzero((drawn == YELLOW).all(axis=-1))
    assert (rows.mean() + 0.5, columns.mean() + 0.5) == (15, 20)


def test_a_picture_of_many_clips_is_no_tall_ribbon(folder: Path, tmp_path: Path) -> None:
    assert view(ViewConfig(folder / "shards", tmp_path / "a.png", clips=9)) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * 32 + 2 * (8 * 183 - 4) + 40, 32 + 92 + 5 * (30 + 143 + 22) - 22 + 32)


@pytest.mark.parametrize("suffix", ["html", "png", "HTML"])
def test_same_clips_give_the_same_bytes(folder: Path, tmp_path: Path, suffix: str) -> None:
    first, second, other = (tmp_path / f"{name}.{suffix}" for name in "abc")
    for output, seed in ((first, 1), (second, 1), (other, 2)):
        assert view(ViewConfig(folder / "small", output, clips=5, seed=seed)) == 0
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second, other]


@pytest.mark.parametrize(("clips", "expected"), [(1, (1, 0)), (4, (2, 2)), (7, (4, 3)), (8, (5, 3)), (10, (7, 3)), (99, (7, 3))])
def test_labels_are_shown_evenly_until_one_has_no_more(folder: Path, tmp_path: Path, clips: int, expected: tuple[int, int]) -> None:
    found = keys(shown(folder, tmp_path / "a.html", split="train", clips=clips))
    assert len(set(found)) == len(found)
    counts = Counter(key.split("/")[1] for key in found)
    assert (counts["nongesture"], counts["gesture"]) == expected
    assert found == sorted(found, key=lambda key: ("nongesture" not in key, key))


def test_the_seed_decides_which_clips_whatever_the_shards(folder: Path, tmp_path: Path) -> None:
    seen = set()
    for seed in range(12):
        found = keys(shown(folder, tmp_path / "a.html", split="train", clips=2, seed=seed))
        assert found == keys(shown(folder, tmp_path / "b.html", "small", split="train", clips=2, seed=seed))
        seen |= set(found)
    assert len(seen) > 6  # of ten


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"split": "vall"}, "--split vall: unknown; expected one of train, val. Did you mean val?"),
        ({"label": "gestur"}, "--label gestur: unknown; expected one of gesture, nongesture. Did you mean gesture?"),
        ({"output": "a.pdf"}, "a.pdf: expected a name that ends in .html or .png"),
        ({"output": "a"}, "expected a name that ends in .html or .png"),
        ({"output": "missing/a.png"}, "missing does not exist"),
        ({"output": "folder.png"}, "folder.png: is a folder"),
        ({"clips": 0}, "--clips 0: expected at least 1"),
        ({"worst": 0}, "--worst 0: expected at least 1"),
        ({"shards": "nowhere"}, "manifest.json: missing"),
        ({"predictions": "none.csv"}, "none.csv: cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(folder: Path, tmp_path: Path, flags: dict[str, Any], said: str) -> None:
    (tmp_path / "folder.png").mkdir()
    shards = folder / flags.pop("shards", "shards")
    output = tmp_path / flags.pop("output", "a.html")
    if "predictions" in flags:
        flags["predictions"] = tmp_path / flags["predictions"]
    with pytest.raises(InputError) as caught:
        view(ViewConfig(shards, output, **flags))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_label_that_a_split_lacks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = write_home(tmp_path, {"train": {"gesture": 1}, "val": {"nongesture": 1}}, 3, 8, 8)
    use_threads(monkeypatch)
    pack(PackConfig(home, tmp_path / "shards", workers=1))
    with pytest.raises(InputError, match="no clip of gesture in val"):
        view(ViewConfig(tmp_path / "shards", tmp_path / "a.png", split="val", label="gesture"))


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_what_is_damaged_is_named_and_leaves_the_old_sheet(folder: Path, tmp_path: Path, suffix: str) -> None:
    shutil.copytree(folder / "small", tmp_path / "shards")
    (shard,) = read_manifest(tmp_path / "shards").splits["val"].shards
    entry = read_index(tmp_path / "shards", "val", shard).clips[0]
    path = tar_path(tmp_path / "shards", "val", shard.name)
    blob = bytearray(path.read_bytes())
    blob[int(entry.frames["offset"][0]) + 40] ^= 1
    path.write_bytes(blob)
    output = tmp_path / f"a.{suffix}"
    output.write_bytes(b"old")
    with pytest.raises(ClipError) as caught:
        view(ViewConfig(tmp_path / "shards", output, split="val"))
    assert f"{path}: clip '{entry.facts.key}': frame 0 at {entry.frames['offset'][0]} is damaged" in str(caught.value)
    assert output.read_bytes() == b"old"
    blob[int(entry.frames["offset"][0]) + 40] ^= 1
    blob[entry.members["keypoints.mp"][0] + 30] ^= 1
    path.write_bytes(blob)
    with pytest.raises(ClipError, match=f"clip '{entry.facts.key}': keypoints at {entry.members['keypoints.mp'][0]} are damaged"):
        view(ViewConfig(tmp_path / "shards", output, split="val"))
    path.write_bytes(blob[:2000])
    with pytest.raises(ClipError, match=r"(is|are) damaged"):
        view(ViewConfig(tmp_path / "shards", output, split="val"))
    path.unlink()
    with pytest.raises(ClipError, match=r"cannot be read .* python -m convert verify"):
        view(ViewConfig(tmp_path / "shards", output, split="val"))
    assert sorted(one.name for one in tmp_path.iterdir()) == [output.name, "shards"]


def test_large_frames_become_small_and_keep_their_aspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = write_home(tmp_path, {"val": {"a": 1}}, 2, 180, 320)
    (file,) = snippets_of(home)
    noise = np.random.RandomState(0).randint(0, 256, (2, 180, 320, 1)).astype(np.uint8)
    rewrite(file, video=np.repeat(noise, 3, axis=3))
    use_threads(monkeypatch)
    pack(PackConfig(home, tmp_path / "shards", codec="zstd", workers=1))
    (clip,) = shown(tmp_path, tmp_path / "a.html").clips
    assert [frame.shape for frame in jpegs(clip)] == [(120, 213, 3)] * 2
    assert jpegs(clip)[0].std() < 60  # grey noise of 74, antialiased


@pytest.mark.parametrize(
    ("spec", "size", "enlarged"),
    [
        ((1, 320, 320), (160, 160), (160, 160)),
        ((1, 720, 1280), (120, 213), (120, 213)),
        ((1, 32, 40), (32, 40), (143, 179)),
        ((1, 1, 90000), (1, 48000), (1, 48000)),
    ],
)
def test_small_frames_have_the_area_of_a_160_pixel_square(spec: tuple[int, int, int], size: tuple[int, int], enlarged: tuple[int, int]) -> None:
    assert small_size(ClipSpec(*spec)) == size
    assert small_size(ClipSpec(*spec), enlarge=True) == enlarged


def test_resizing_by_one_is_a_copy() -> None:
    frame = np.zeros((4, 4, 3), np.uint8)
    same = resized(frame, (4, 4))
    frame[:] = 9
    assert not same.any()


def test_strips_are_even_and_go_from_the_first_to_the_last_valid_frame() -> None:
    assert strip_numbers(39) == [0, 5, 10, 16, 21, 27, 32, 38]
    for valid in range(1, 60):
        numbers = strip_numbers(valid)
        assert len(numbers) == min(8, valid)
        assert numbers[0] == 0 and numbers[-1] == valid - 1
        gaps = np.diff(numbers)
        assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_long_texts_lose_their_middle() -> None:
    assert fitted("abcdef", 6, len) == "abcdef"
    assert fitted("abcdefgh", 6, len) == "ab…fgh"
    assert fitted("abcdefgh", 1, len) == "…" == fitted("abc", 0, len)
