"""Sweeps: element I takes line I, a run's folder is named after its flags alone, and mistakes are named before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips.environment import Array
from clips.errors import InputError
from training.sweep import MAX_NAME, name_of, names, read_lines, with_line

COMMAND = ["--dataset-home", "shards", "--logger-folder", "runs/lr", "--epochs", "3", "--model-name", "videomae"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.txt"
    path.write_text("# learning rates\n--lr 1e-3 --seed 2\n\n--lr=5e-4   # the recipe's\n--dataset-home '/data/other shards' --balance\n")
    return path


def element(number: int) -> Array:
    return Array(number, 3, 1, 3)


def test_element_i_takes_line_i_and_its_flags_come_last(sweep: Path) -> None:
    words = with_line([*COMMAND, "--sweep", str(sweep)], element(1))
    assert words == [*COMMAND, "--sweep", str(sweep), "--lr", "1e-3", "--seed", "2", "--logger-folder", "runs/lr/lr-1e-3_seed-2", "--no-evaluate-test"]
    assert "runs/lr/lr-5e-4" in with_line([*COMMAND, "--sweep", str(sweep)], element(2))
    assert "runs/lr/dataset-home-other-shards_balance" in with_line([*COMMAND, "--sweep", str(sweep)], element(3))


def test_the_line_that_is_taken_is_said(sweep: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        with_line([*COMMAND, "--sweep", str(sweep)], element(1))
    assert caplog.messages == ["sweep: line 1 of 3: --lr 1e-3 --seed 2 -> lr-1e-3_seed-2; test stays unseen"]


def test_a_line_can_be_asked_for_where_there_is_no_array(sweep: Path) -> None:
    asked = [*COMMAND, "--sweep", str(sweep), "--line", "2"]
    assert with_line(asked, None) == with_line(asked, element(1))
    assert "--lr=5e-4" in with_line(asked, None)


def test_without_a_sweep_nothing_changes_even_in_an_array() -> None:
    assert with_line(COMMAND, element(2)) == COMMAND


@pytest.mark.parametrize(
    ("flags", "array", "message"),
    [
        ([], None, "which of its 3 lines? Give --line, or submit a job array: sbatch --array=1-3"),
        ([], Array(0, 4, 0, 3), "element 0 of the job array has no line; expected --array=1-3"),
        ([], Array(4, 4, 1, 4), "element 4 of the job array has no line"),
        (["--line", "0"], None, "--line 0: expected 1 to 3"),
        (["--line", "x"], None, "--line x: expected 1 to 3"),
    ],
)
def test_an_element_without_a_line_is_named(sweep: Path, flags: list[str], array: Array | None, message: str) -> None:
    with pytest.raises(InputError) as found:
        with_line([*COMMAND, "--sweep", str(sweep), *flags], array)
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--lr 1e-3\n--lr  '1e-3'\n", "2 lines make the run lr-1e-3"),
        ("--lr 1e-3\n--seed 1 --logger-folder x\n", "line 2: --logger-folder belongs to the command"),
        ("--logger_folder=x\n", "line 1: --logger_folder=x belongs to the command"),
        ("--lr '1e-3\n", "line 1: --lr '1e-3: No closing quotation"),
        ("lr 1e-3\n", "line 1: expected flags such as --lr 1e-3, found lr"),
        ("# nothing\n\n", "holds no line of flags"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sweep.txt"
    path.write_text(text)
    with pytest.raises(InputError) as found:
        read_lines(path)
    assert message in str(found.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--sweep .*none.txt: expected a file.*No such file"):
        with_line([*COMMAND, "--sweep", str(tmp_path / "none.txt")], element(1))


@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=6))
def test_a_name_is_one_folder_of_any_file_system(values: list[str]) -> None:
    name = name_of(["--flag", *(value for value in values if not value.startswith("--"))])
    assert "/" not in name and name.isascii() and len(name) <= MAX_NAME and name not in (".", "..")


def test_long_lines_that_begin_alike_have_different_names() -> None:
    begin = [f"--crop-scale={'0' * 200}"]
    assert name_of([*begin, "--seed", "1"]) != name_of([*begin, "--seed", "2"])


def test_every_fold_has_a_name_of_its_own() -> None:
    assert names([["--fold", f"{number}/5"] for number in range(1, 6)]) == [f"fold-{number}-5" for number in range(1, 6)]


def test_two_homes_with_one_last_part_are_told_apart_by_the_user() -> None:
    with pytest.raises(InputError, match=r"2 lines make the run dataset-home-shards.*give their paths different last parts"):
        names([["--dataset-home", "/a/shards"], ["--dataset-home", "/b/shards"]])


def test_a_flag_without_its_value_is_named() -> None:
    with pytest.raises(InputError, match=r"--sweep.*expected one argument"):
        with_line([*COMMAND, "--sweep"], None)


def test_a_line_without_a_sweep_is_refused() -> None:
    with pytest.raises(InputError, match="--line: picks a line of --sweep"):
        with_line([*COMMAND, "--line", "2"], None)
