"""python -m loaders: the lines that order prints are what each rank will read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clips.errors import InputError
from loaders.order import OrderConfig, order_lines
from loaders.source import fraction, open_source
from tests import by_hand
from tests.loading import MANY_SHARDS_MIB, SEED, keys_in, keys_of, npz_home, opened, shards

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def npz(base: Path) -> Path:
    return npz_home(base)


def lines_of(home: Path, **flags: float) -> list[dict[str, object]]:
    config = OrderConfig(home, seed=SEED, **flags)  # type: ignore[arg-type]  # all of these fields are numbers
    return [json.loads(line) for line in order_lines(config)]


def test_each_line_is_a_step_and_rank_with_its_keys(npz: Path) -> None:
    keys = keys_of(npz)
    order = [keys[number] for number in by_hand.permutation(21, "order", SEED, 5)]
    expected = [{"step": step, "rank": rank, "keys": order[step * 6 + rank * 2 : step * 6 + rank * 2 + 2]} for step in range(3) for rank in range(3)]
    assert lines_of(npz, epoch=5, world_size=3, batch_size=6) == expected


def test_the_lines_are_the_same_from_npz_and_from_shards(base: Path, npz: Path) -> None:
    flags = {"epoch": 1, "world_size": 2, "batch_size": 4}
    assert lines_of(npz, **flags) == lines_of(shards(base, "zstd", MANY_SHARDS_MIB), **flags)


def test_a_training_reads_what_was_printed(npz: Path) -> None:
    printed = lines_of(npz, epoch=1, world_size=2, batch_size=4)
    for rank in range(2):
        with opened(npz, rank=rank, world_size=2, micro_batch=1) as made:
            assert keys_in(made.training(1)) == [key for line in printed if line["rank"] == rank for key in line["keys"]]  # type: ignore[attr-defined]


def test_a_fraction_has_the_order_of_its_own_clips(npz: Path) -> None:
    facts = open_source(npz, "train").facts
    chosen = [facts[number].key for number in fraction(facts, 0.5)]
    assert 0 < len(chosen) < 21
    order = [chosen[number] for number in by_hand.permutation(len(chosen), "order", SEED, 0)]
    assert [key for line in lines_of(npz, batch_size=2, fraction=0.5) for key in line["keys"]] == order[: len(order) // 2 * 2]  # type: ignore[attr-defined]


def test_a_balanced_epoch_has_as_many_clips_of_each_class(npz: Path) -> None:
    for epoch in range(3):
        printed = [key for line in lines_of(npz, batch_size=2, epoch=epoch, balance=True) for key in line["keys"]]  # type: ignore[attr-defined]
        assert len(set(printed)) == len(printed) == 18
        assert sum(key.startswith("train/gesture/") for key in printed) == 9


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"batch_size": 20, "balance": True}, "--batch-size 20: an epoch has 18 clips in balanced classes, .* no --balance"),
        ({"batch_size": 24, "world_size": 4}, r"an epoch has 21 clips, not enough for one step\. Give a --batch-size of at most 20"),
        ({"fraction": 0.0}, "--fraction 0.0"),
        ({"batch_size": 22}, "--batch-size 22: an epoch has 21 clips, not enough"),
        ({"batch_size": 4, "world_size": 3}, "--batch-size 4: expected a multiple of the 3 ranks"),
        ({"batch_size": 8, "fraction": 0.1}, "--batch-size 8: an epoch has 3 clips, .* at most 3, or more clips: a larger --fraction"),
        ({"batch_size": 0}, "--batch-size 0: expected at least 1"),
        ({"batch_size": 4, "repeats": 0}, "--repeats 0: expected at least 1"),
        ({"world_size": 0}, "--world-size 0"),
        ({"epoch": -1}, "--epoch -1"),
    ],
)
def test_what_training_would_refuse_is_refused(npz: Path, flags: dict[str, float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        lines_of(npz, **flags)


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "loaders", *args], cwd=REPOSITORY, capture_output=True, text=True)


def test_the_command_prints_one_json_line_a_step_and_rank(npz: Path) -> None:
    flags = ["--split", "val", "--seed", str(SEED), "--epoch", "2", "--world-size", "2", "--batch-size", "2"]
    done = command("order", "--dataset-home", str(npz), *flags)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["step"], line["rank"], len(line["keys"])) for line in lines] == [(step, rank, 1) for step in range(3) for rank in range(2)]
    assert len({key for line in lines for key in line["keys"]}) == 6


def test_the_verbs_are_told() -> None:
    done = command("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("order", "stage", "certify"))


def test_a_wrong_home_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = command("order", "--dataset-home", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --dataset-home {tmp_path / 'nowhere'}: no such folder") and done.stderr.count("\n") == 1


def test_the_order_is_told_without_torch(base: Path) -> None:
    home = shards(base, "zstd", MANY_SHARDS_MIB)
    program = (
        "import sys; from pathlib import Path; from loaders.order import OrderConfig, order_lines; "
        f"list(order_lines(OrderConfig(Path({str(home)!r}), batch_size=4))); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0
