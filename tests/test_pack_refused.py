"""What pack refuses: each fault one clear line, and nothing left behind that looks like an end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clips import command
from clips.errors import InputError
from convert.__main__ import main
from convert.pack import PackConfig, pack
from convert.writer import write_shard
from tests.making import tell_tale_mask, tell_tale_video, write_home
from tests.packing import convert, not_half_written, refused, rewrite, snippets_of, tree


def test_bad_flags_are_named_before_anything_is_read(tmp_path: Path) -> None:
    home, out = tmp_path / "nowhere", tmp_path / "out"
    for flags, text in [
        ({"codec": "jpg"}, "--codec jpg: unknown; expected one of jpeg, zstd. Did you mean jpeg?"),
        ({"workers": 0}, "--workers 0: expected at least 1."),
        ({"shard_mib": 0.0}, "--shard-mib 0.0: expected a size above 0."),
        ({"shard_mib": float("nan")}, "--shard-mib nan: expected a size above 0."),
        ({"shard_mib": float("inf")}, "--shard-mib inf: expected a size above 0."),
        ({"max_bad_clips": -1}, "--max-bad-clips -1: expected 0 or more."),
        ({"tasks": 0}, "--tasks 0: expected at least 1."),
        ({"codec": "zstd", "store_size": 16}, "--store-size 16 with --codec zstd: smaller frames are not bit-exact."),
    ]:
        with pytest.raises(InputError) as error:
            PackConfig(home, out, **flags)  # type: ignore[arg-type]  # each flag has its own type
        assert str(error.value).startswith(text)


@pytest.mark.parametrize("size", [15, 32, 400])
def test_a_stored_size_is_smaller_than_the_frames(size: int, packing: PackConfig) -> None:
    assert f"--store-size {size}: expected 16 … 31 for frames of 32x32." in refused(replace(packing, codec="jpeg", store_size=size))


@pytest.mark.parametrize(("codec", "flags", "text"), [("jpeg", {"quality": 0}, "--quality 0"), ("zstd", {"level": 99}, "--level 99")])
def test_a_codecs_setting_out_of_range_is_refused(codec: str, flags: dict[str, Any], text: str, packing: PackConfig) -> None:
    assert text in refused(replace(packing, codec=codec, **flags))
    assert not packing.output.exists()


def test_a_missing_and_an_empty_home_are_refused(packing: PackConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused(replace(packing, dataset_home=tmp_path / "nowhere"))
    assert "found an empty folder" in refused(replace(packing, dataset_home=tmp_path / "empty"))
    assert not packing.output.exists()


def test_a_home_that_holds_shards_is_refused(packing: PackConfig, tmp_path: Path) -> None:
    pack(packing)
    assert "holds shards already; expected npz snippets." in refused(replace(packing, dataset_home=packing.output, output=tmp_path / "again"))


def test_bad_headers_are_all_listed_before_anything_is_written(packing: PackConfig) -> None:
    paths = snippets_of(packing.dataset_home)
    rewrite(paths[0], video=tell_tale_video(0, 8, 32, 16), keypoints=tell_tale_mask(0, 8, 32, 16))
    rewrite(paths[1], keypoints=None)
    rewrite(paths[2], video=np.zeros((8, 32, 32, 3), np.float32))
    rewrite(paths[3], keypoints=np.array([None]))
    paths[4].write_bytes(paths[4].read_bytes()[:1000])
    with pytest.raises(InputError) as error:
        pack(packing)
    lines = str(error.value).splitlines()
    assert lines[0] == "5 of 10 snippets cannot be used:" and len(lines) == 7
    for path, line in zip(paths[:5], lines[1:6], strict=True):
        assert line.startswith(f"  {path.relative_to(packing.dataset_home).as_posix()}: ")
    assert not packing.output.exists()


def test_two_snippets_with_one_key_are_refused(packing: PackConfig) -> None:
    path = snippets_of(packing.dataset_home)[0]
    shutil.copy(path, path.with_name("a.b.npz"))
    shutil.copy(path, path.with_name("a_b.npz"))
    assert "a.b.npz and " in refused(packing)


def test_a_folder_of_another_plan_says_what_differs(packing: PackConfig) -> None:
    pack(packing)
    before = tree(packing.output)
    path = snippets_of(packing.dataset_home / "train")[0]

    def says(config: PackConfig) -> str:
        with pytest.raises(InputError) as error:
            pack(config)
        assert tree(packing.output) == before and "\n" not in str(error.value)
        return str(error.value)

    def says_of_plans(config: PackConfig) -> str:
        with pytest.raises(InputError) as error:
            pack(config)
        return str(error.value)

    text = says(replace(packing, level=3))
    assert "its shards were packed with other settings: codec_settings.level is 3 here and 1 there." in text
    assert "codec is jpeg here and zstd there" in says(replace(packing, codec="jpeg"))
    assert "clips_per_shard is " in says(replace(packing, shard_mib=100))
    assert "classes is " in says(replace(packing, classes=("gesture", "nongesture")))
    (packing.output / "manifest.json").rename(packing.output / "aside")  # before its end, a folder has plans alone
    text = says_of_plans(replace(packing, level=3))
    assert "train is in use by another plan" in text and "settings.codec_settings.level is 3 here and 1 there" in text
    (packing.output / "aside").rename(packing.output / "manifest.json")
    shutil.copy(path, path.with_name("999999999_new.npz"))
    assert "1 file added, removed or changed in size, train/gesture/999999999_new.npz first" in says(packing)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"plan_id": 3}', '{"plan_id": "x", "inputs": {"files": 3}}'])
def test_a_damaged_plan_is_one_clear_line(text: str, packing: PackConfig) -> None:
    (packing.output / "train").mkdir(parents=True)
    (packing.output / "train/plan.json").write_text(text)
    assert "train" in refused(packing)


def test_shards_of_another_format_version_are_refused(packing: PackConfig) -> None:
    pack(packing)
    path = packing.output / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="format version 2; this program reads version 1"):
        pack(packing)


def test_an_output_that_cannot_be_written_is_refused(packing: PackConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot be written (" in refused(replace(packing, output=tmp_path / "file"))
    assert "cannot be written (" in refused(replace(packing, output=tmp_path / "file/below"))
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_is_one_clear_line_and_whole_shards_stay(packing: PackConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: Iterator[bool] = iter([True, True] + [False] * 20)

    def full(*args: Any) -> Any:
        if next(writes):
            return write_shard(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.work.write_shard", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)\. Make space"):
        pack(packing)
    assert not_half_written(packing.output) and len(list(packing.output.rglob("*.tar"))) == 2
    monkeypatch.setattr("convert.work.write_shard", write_shard)
    pack(packing)
    before = tree(packing.output)
    shutil.rmtree(packing.output)
    pack(packing)
    assert tree(packing.output) == before


def test_a_wrong_value_on_the_command_line_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    found = convert("pack", "--dataset-home", tmp_path / "nowhere", "--output", tmp_path / "out", "--codec", "zstdd")
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == "error: --codec zstdd: unknown; expected one of jpeg, zstd. Did you mean zstd?\n"
    assert not (tmp_path / "out").exists()


def test_what_a_user_did_wrong_ends_with_2_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PackConfig(tmp_path / "nowhere", tmp_path / "out")

    def main() -> None:
        raise AssertionError(pack(config))

    assert command.run(main) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: --dataset-home ") and found.err.count("\n") == 1 and found.out == ""


def test_a_share_is_not_verified(tmp_path: Path) -> None:
    home = write_home(tmp_path / "npz", {"train": {"nongesture": 1, "gesture": 1}}, frames=2, height=16, width=16)
    with pytest.raises(InputError, match="--verify: one share of several"):
        pack(PackConfig(home, tmp_path / "shards", task=0, tasks=2, verify=True))
    assert not (tmp_path / "shards").exists()


def test_pack_verifies_in_one_go_and_gives_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    home = write_home(tmp_path / "npz", {"train": {"nongesture": 2, "gesture": 2}}, frames=2, height=16, width=16)
    words = ["convert", "pack", "--dataset-home", str(home), "--output", str(tmp_path / "shards"), "--workers", "1", "--verify"]
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0
    assert (tmp_path / "shards" / "verified.json").exists()
    rewrite(next(home.rglob("*.npz")), video=np.zeros((2, 16, 16, 3), np.uint8))  # another clip than was packed
    monkeypatch.setattr("convert.__main__.pack", lambda _: None)
    assert main() == 1
    assert "1 problem" in capsys.readouterr().out
