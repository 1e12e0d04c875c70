"""Folds over sources: every clip is held out once, no source is on both sides, every fold has every class."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from clips.errors import InputError
from clips.format import ClipFacts
from convert.pack import PackConfig, pack
from loaders.certify import CertifyConfig, certify
from loaders.folds import Fold, PartOfSource, folds_of, numbers_of, parse_fold
from loaders.home import open_home
from loaders.joints import Scratch
from loaders.order import OrderConfig, order_lines
from loaders.source import open_source
from tests.making import write_home
from training.distributed import Group
from training.run_folder import RunFolder

NAMES = ("nongesture", "gesture")


def clips_of(counts: dict[str, tuple[int, int]]) -> list[ClipFacts]:
    """So many clips of each class for each source, sorted by key."""
    facts = [
        ClipFacts(f"train/{NAMES[label]}/{number:09d}_{source}", label, source, number, None, None, 39)
        for source, of_class in counts.items()
        for label, count in enumerate(of_class)
        for number in range(count)
    ]
    return sorted(facts, key=lambda fact: fact.key)


COUNTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=12)


@given(COUNTS, st.integers(2, 4))
def test_every_clip_is_held_out_in_one_fold_and_its_source_with_it(counts: dict[str, tuple[int, int]], num_folds: int) -> None:
    facts = clips_of(counts)
    held_out = []
    for number in range(1, num_folds + 1):
        trained, held = numbers_of(facts, NAMES, Fold(number, num_folds))
        assert sorted(trained + held) == list(range(len(facts)))
        assert {facts[place].source for place in trained}.isdisjoint({facts[place].source for place in held})
        held_out += held
    assert sorted(held_out) == list(range(len(facts)))


@given(COUNTS)
def test_folds_hang_on_names_and_labels_and_not_on_the_order_of_clips(counts: dict[str, tuple[int, int]]) -> None:
    facts = clips_of(counts)
    assert folds_of(facts, 2, 3) == folds_of(facts[::-1], 2, 3)


def test_sources_are_dealt_largest_first_to_the_lightest_fold_the_rarest_class_first() -> None:
    facts = clips_of({"a": (1, 5), "b": (9, 4), "c": (2, 3), "d": (7, 2), "e": (30, 0), "f": (1, 0)})
    # gesture, 14 clips in all: a to fold 1 (5), b to 2 (4), c to 2 (7), d to 1 (7); with them come 1 + 7 and 9 + 2 clips of nongesture
    # nongesture, 49: fold 1 holds 8, fold 2 holds 11; e to 1 (38), f to 2 (12)
    assert folds_of(facts, 2, 2) == {"a": 1, "b": 2, "c": 2, "d": 1, "e": 1, "f": 2}


def test_a_fold_without_a_class_is_an_error_that_says_where_the_class_is() -> None:
    facts = clips_of({"a": (3, 1), "b": (3, 1), "c": (3, 0)})
    with pytest.raises(InputError, match=r"--fold 1/3: fold \d would hold no clip of gesture.*nongesture in 3, gesture in 2. Give fewer folds"):
        numbers_of(facts, NAMES, Fold(1, 3))
    assert numbers_of(facts, NAMES, Fold(1, 2))


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "1", "1/0", "a/b", "-1/5", ""])
def test_what_is_no_fold_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected I/K"):
        parse_fold(text)


def test_a_fold_is_read_as_it_is_written() -> None:
    assert parse_fold("2/10") == Fold(2, 10)
    assert str(Fold(2, 10)) == "2/10"


def test_a_part_of_a_source_gives_its_clips_by_new_numbers_also_in_another_process(tmp_path: Path) -> None:
    home = write_home(tmp_path / "npz", {"train": {"nongesture": 5, "gesture": 4}}, frames=4, height=32, width=32)
    pack(PackConfig(home, tmp_path / "shards", codec="zstd", workers=1))
    whole = open_source(tmp_path / "shards", "train")
    part = pickle.loads(pickle.dumps(PartOfSource(whole, [1, 4, 7], "fold 1/3")))
    assert [fact.key for fact in part.facts] == [whole.facts[number].key for number in (1, 4, 7)]
    for number, fact in enumerate(part.facts):
        frames = Scratch((32, 32, 3))
        loaded = part.fetch(number, lambda _: np.arange(2), True).decode(frames)
        assert (loaded.key, loaded.label) == (fact.key, fact.label)
        assert part.where(number) == whole.where([1, 4, 7][number])
    assert "fold 1/3" in part.describe()[0]
    part.close()
    whole.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_home(tmp_path_factory.mktemp("npz"), {"train": {"nongesture": 9, "gesture": 9}, "val": {"gesture": 1}, "test": {"nongesture": 1}}, 16, 64, 64)
    output = tmp_path_factory.mktemp("shards") / "zstd"
    pack(PackConfig(home, output, codec="zstd", workers=1))
    return output


def test_a_fold_stands_in_for_val_and_test_stays(shards: Path) -> None:
    whole, folded = open_home(shards), open_home(shards, fold="2/3")
    keys = {split: [fact.key for fact in source.facts] for split, source in folded.sources.items()}
    assert sorted(keys["train"] + keys["val"]) == [fact.key for fact in whole.sources["train"].facts]
    assert len(keys["val"]) == 6
    assert keys["test"] == [fact.key for fact in whole.sources["test"].facts]
    assert folded.fingerprints()["train"] != whole.fingerprints()["train"]
    assert "fold 2/3 of train" in folded.describe()[1]


def test_a_fold_is_trained_evaluated_and_certified(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset-home", str(shards), "--logger-folder", str(tmp_path / "run"), "--epochs", "2", "--model-name", "videomae-tiny", "--batch-size", "4"]
    config = train.parse([*flags, "--device", "cpu", "--fold", "1/3", "--decode-in", "process", "--no-evaluate-test", "--log-every", "1"])
    train.train(config, Group(0, 1, 0, torch.device("cpu"), "single"), RunFolder(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = len(open_home(shards, fold="1/3").sources["val"].facts)
    assert [sum(map(sum, line["val/confusion"])) for line in lines if "val/confusion" in line] == [held_out, held_out]
    assert not any(name.startswith("test/") for line in lines for name in line)
    assert certify(CertifyConfig(tmp_path / "run")) == 0
    assert "2 epochs as planned" in capsys.readouterr().out


def test_the_order_of_a_fold_is_printed_without_training(shards: Path) -> None:
    asked = OrderConfig(shards, batch_size=1, fold="1/3")
    keys = {key for line in order_lines(asked) for key in json.loads(line)["keys"]}
    assert keys == {fact.key for fact in open_home(shards, fold="1/3").sources["train"].facts}


def test_sources_on_both_sides_are_said_and_a_fold_takes_them_off_val(tmp_path: Path) -> None:
    home = write_home(tmp_path / "npz", {"train": {"nongesture": 12, "gesture": 12}, "val": {"nongesture": 1, "gesture": 1}}, frames=2, height=16, width=16)
    assert not [line for line in open_home(home).describe() if line.startswith("leak: ")]
    for snippet in sorted((home / "train").glob("*/*.npz"))[:2]:
        (home / "val" / snippet.parent.name / snippet.name.replace("000000", "000009", 1)).write_bytes(snippet.read_bytes())
    (line,) = [line for line in open_home(home).describe() if line.startswith("leak: ")]
    assert "of val too" in line and "--fold" in line
    assert not [line for line in open_home(home, fold="1/2").describe() if line.startswith("leak: ")]
