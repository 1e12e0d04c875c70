"""--plan: hours, jobs and room, against numbers worked out by hand and against a real checkpoint."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clips.errors import InputError
from models import ModelConfig, build_model
from training import checkpoint, room
from training.ema import Ema
from training.planner import PlanConfig, bytes_of_shards, plan_lines, seconds_of_epoch, sizes

GB = 10**9


def lines_of(**changed: float | None) -> list[str]:
    """36000 clips at 10 clips/s: an hour; nothing evaluated or written; a job of 5 h 11 min trains 5 h."""
    asked: dict[str, float | None] = {
        "clips_per_s": 10.0,
        "epoch_clips": 36000,
        "eval_clips": 0,
        "epochs": 12,
        "limit_hours": 5 + 11 / 60,
        "lead_minutes": 5.0,
        "checkpoint_bytes": 0,
        "best_bytes": 0,
        "shards_bytes": 0,
        "stage_mb_per_s": None,
    }
    return plan_lines(**asked | changed)  # type: ignore[arg-type]  # each of its own kind


def links_of(lines: list[str]) -> int:
    found = re.search(r"(\d+) jobs, .*submit.sh (\d+) …, or --array=1-(\d+)%1", lines[2])
    if found is None:
        assert "one job is enough" in lines[2]
        return 1
    assert len(set(found.groups())) == 1
    return int(found[1])


def test_twelve_hours_of_training_in_jobs_of_five_take_three() -> None:
    lines = lines_of()
    assert len(lines) == 4 and all(line.startswith("plan: ") for line in lines)
    assert "60.0 min an epoch: 36000 clips at 10 clips/s" in lines[0]
    assert "trains 5.0 h, 5.0 epochs: 5 min for the start, and the signal 5 min before the end, up to 1 min early" in lines[1]
    assert "12 epochs take 12.0 h: 3 jobs, the last 40 % full" in lines[2]


@pytest.mark.parametrize(("epochs", "links"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 3), (100, 20)])
def test_a_job_that_is_just_full_needs_no_next_one(epochs: int, links: int) -> None:
    assert links_of(lines_of(epochs=epochs)) == links


def test_an_epoch_longer_than_a_job_still_goes_on() -> None:
    lines = lines_of(epochs=1, clips_per_s=1.0)  # ten hours
    assert "0.5 epochs" in lines[1] and links_of(lines) == 2


def test_evaluation_and_saves_count() -> None:
    assert seconds_of_epoch(10, 36000, 0, 0, 0) == 3600
    assert seconds_of_epoch(10, 36000, 2000, 0, 0) == 3600 + 100
    assert seconds_of_epoch(10, 36000, 0, GB, 0) == 3600 + 7 * 10  # after each ten minutes, and at the end
    assert seconds_of_epoch(10, 36000, 0, 0, GB) == 3600 + 10
    assert seconds_of_epoch(10, 3000, 0, GB, 0) == 300 + 10


@given(
    st.floats(0.1, 5000), st.integers(1, 10**6), st.integers(0, 10**5), st.integers(1, 300), st.floats(0.5, 72), st.integers(0, 10 * GB), st.integers(0, GB)
)
def test_the_chain_has_room_for_the_run_and_no_job_too_many(
    clips_per_s: float, epoch_clips: int, eval_clips: int, epochs: int, hours: float, size: int, best: int
) -> None:
    asked = {"clips_per_s": clips_per_s, "epoch_clips": epoch_clips, "eval_clips": eval_clips, "checkpoint_bytes": size, "best_bytes": best}
    links = links_of(lines_of(**asked, epochs=epochs, limit_hours=hours))
    needed_s = epochs * seconds_of_epoch(**asked)  # type: ignore[arg-type]  # as above
    job_s = 3600 * hours - 11 * 60
    assert (links - 1) * job_s < needed_s * (1 + 1e-6)
    assert links * job_s > needed_s * (1 - 1e-6) - 1e-6 * job_s
    assert links_of(lines_of(**asked | {"clips_per_s": clips_per_s / 2}, epochs=epochs, limit_hours=hours)) >= links


def test_a_limit_without_time_to_train_is_refused() -> None:
    with pytest.raises(InputError, match=r"--plan 0\.18: start-up and the signal before the end take 11 minutes"):
        lines_of(limit_hours=0.18)
    assert lines_of(limit_hours=0.19)


def test_room_and_staging_are_told() -> None:
    lines = lines_of(checkpoint_bytes=GB, best_bytes=GB // 2, shards_bytes=120 * GB)
    assert "a checkpoint has 1.0 GB, best/ 500 MB; the run's folder holds up to 4.0 GB" in lines[3]
    assert "120.0 GB of shards in 10.0 min at 200 MB/s, which is assumed" in lines[4]
    assert "in 2.0 min at 1000 MB/s, while" in lines_of(shards_bytes=120 * GB, stage_mb_per_s=1000)[4]


def test_a_save_too_slow_for_the_signal_is_told() -> None:
    assert len(lines_of(checkpoint_bytes=15 * GB)) == 4  # 150 s of 300
    told = "a save takes 2.7 min at 100 MB/s, more than half of the 5 min before the end: submit with --signal=USR2@360"
    assert told in lines_of(checkpoint_bytes=16 * GB)[4]


@pytest.mark.parametrize(("freeze", "average"), [(False, False), (False, True), (True, False)])
def test_the_sizes_are_those_of_a_real_checkpoint(freeze: bool, average: bool, tmp_path: Path) -> None:
    model = build_model(ModelConfig("videomae-tiny", freeze=freeze), ("a", "b"))
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for one in trained:
        one.grad = torch.zeros_like(one)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()} | ({"ema": Ema(model, 0.9).state_dict()} if average else {})
    found = sizes(model, average)
    written = checkpoint.save(tmp_path, 1, state).stat().st_size
    model.save(tmp_path / "best", ("a", "b"))
    assert found[0] == pytest.approx(written, rel=0.1)  # names and padding weigh more in a tiny model
    assert found[1] == pytest.approx((tmp_path / "best" / "model.safetensors").stat().st_size, rel=0.1)
    assert room.most_bytes(*found) == 3 * found[0] + 2 * found[1]


def test_npz_has_no_shards_to_stage(tmp_path: Path) -> None:
    assert bytes_of_shards(tmp_path) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plan": 0}, "--plan 0: expected hours"),
        ({"plan": math.inf}, "--plan inf"),
        ({"plan": math.nan}, "--plan nan"),
        ({"plan": 24.0, "clips_per_s": -1.0}, "--clips-per-s -1.0: expected clips a second"),
        ({"clips_per_s": 100.0}, "Give --plan HOURS too"),
    ],
)
def test_flags_that_make_no_plan_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PlanConfig(**values)


def test_no_plan_is_asked_by_default() -> None:
    assert PlanConfig().plan is None and PlanConfig(24.0, 370.0).clips_per_s == 370.0


def test_saves_are_counted_as_often_as_asked() -> None:
    # an hour of training at 100 MB/s: 1 + 6 saves of 1 GB every 10 minutes are 70 s, 1 + 60 every minute 610 s
    assert seconds_of_epoch(10.0, 36000, 0, GB, 0) == pytest.approx(3600 + 70)
    assert seconds_of_epoch(10.0, 36000, 0, GB, 0, 1.0) == pytest.approx(3600 + 610)
    assert "a save every 1 min" in lines_of(checkpoint_minutes=1.0)[0]
