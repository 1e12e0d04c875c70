"""Queueing a job again: only where it helps, never for ever, and with the array's own names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clips.environment import job_name
from clips.errors import InputError
from training.requeue import FILE, RequeueConfig, after_stop, count_start, queue_again, state_of


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that notes its words and answers with the file `answer`; exit code in the file `code`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "answer").write_text("JobId=12 JobName=train JobState=RUNNING Reason=None")
    (folder / "code").write_text("0")
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\necho \"$*\" >> {folder}/words\ncat {folder}/answer\nexit $(cat {folder}/code)\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_running_job_is_queued_again_by_its_name(scontrol: Path) -> None:
    queue_again("12_3")
    assert (scontrol / "words").read_text().splitlines() == ["show job -o 12_3", "requeue 12_3"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT"])
def test_a_job_that_slurm_ends_or_has_queued_itself_is_left_alone(scontrol: Path, state: str, caplog: pytest.LogCaptureFixture) -> None:
    (scontrol / "answer").write_text(f"JobId=12 JobState={state} Reason=None")
    with caplog.at_level("INFO"):
        queue_again("12")
    assert (scontrol / "words").read_text().splitlines() == ["show job -o 12"]
    assert f"job 12 is {state}" in caplog.text


def test_a_refusal_says_that_the_run_is_saved(scontrol: Path) -> None:
    (scontrol / "answer").write_text("Requeue is disabled for the job")
    (scontrol / "code").write_text("1")
    with pytest.raises(InputError, match=r"scontrol show job -o 12: Requeue is disabled.*The run is saved: submit"):
        queue_again("12")


def test_without_scontrol_the_run_is_still_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"No such file or directory.*The run is saved"):
        state_of("12")


def test_a_job_is_named_as_scontrol_names_it() -> None:
    element = {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_name(element) == "12_3"
    assert job_name({"SLURM_JOB_ID": "15"}) == "15"
    assert job_name({}) is None


def test_starts_without_a_step_are_counted_and_the_next_is_an_error(tmp_path: Path) -> None:
    for _ in range(3):
        count_start(tmp_path, 70, 3)
    with pytest.raises(InputError, match=f"the last 3 starts of this run made no step after step 70.*remove .*{FILE}"):
        count_start(tmp_path, 70, 3)
    (tmp_path / FILE).unlink()
    count_start(tmp_path, 70, 3)


def test_a_step_ends_the_count(tmp_path: Path) -> None:
    for step in (0, 0, 0, 8, 8, 8, 9):
        count_start(tmp_path, step, 3)


def test_a_damaged_count_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_text("{")
    count_start(tmp_path, 5, 1)
    assert "damaged" in caplog.text
    with pytest.raises(InputError):
        count_start(tmp_path, 5, 1)


def test_requeue_is_refused_where_it_makes_no_sense() -> None:
    asked = RequeueConfig(requeue=True)
    with pytest.raises(InputError, match="expected a SLURM job"):
        asked.check(None, in_array=False, in_sweep=False)
    with pytest.raises(InputError, match="element of a chain"):
        asked.check("12_3", in_array=True, in_sweep=False)
    asked.check("12_3", in_array=True, in_sweep=True)
    asked.check("12", in_array=False, in_sweep=False)
    RequeueConfig().check(None, in_array=False, in_sweep=False)
    with pytest.raises(InputError, match="--max-restarts 0"):
        RequeueConfig(max_restarts=0)


PREEMPTED = "JobId=12 JobState=RUNNING Requeue=1 PreemptTime=2026-01-02T03:04:05 TimeLimit=1-00:00:00"


@pytest.mark.parametrize(
    ("shown", "asked", "is_queued"),
    [
        (PREEMPTED, False, True),  # within its grace time: ending well it would count as done
        (PREEMPTED.replace("Requeue=1", "Requeue=0"), False, False),
        (PREEMPTED.replace("2026-01-02T03:04:05", "None"), False, False),
        (PREEMPTED.replace("2026-01-02T03:04:05", "None"), True, True),
        (PREEMPTED.replace("RUNNING", "COMPLETING"), True, False),
    ],
)
def test_a_stopped_job_is_queued_where_it_was_asked_for_or_slurm_preempts_it(scontrol: Path, shown: str, asked: bool, is_queued: bool) -> None:
    (scontrol / "answer").write_text(shown)
    after_stop("12", asked)
    assert ("requeue 12" in (scontrol / "words").read_text()) is is_queued


def test_where_slurm_does_not_answer_a_stopped_job_just_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level("INFO"):
        after_stop("12", requeue=False)
    assert "is not known" in caplog.text
