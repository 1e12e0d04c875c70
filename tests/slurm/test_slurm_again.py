"""Runs that outlive their jobs, by a chain, by requeueing, after preemption and after a time limit: each ends with the bits of a quiet one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.site import Site, assert_same_run, steps

pytestmark = pytest.mark.slurm


def signal_at(site: Site, job: str, name: str, step: int) -> None:
    """USR2, as --signal=USR2@300 sends it to a job's steps, once the run has made that many."""
    site.wait_for_step(name, step)
    site.cluster.run("scancel", "--signal=USR2", f"{site.cluster.number(job)}.0")


def stopped_at(run: Path) -> int:
    """The step at which a run says that it was stopped."""
    return int(json.loads((run / "stopped.json").read_text())["reason"].rpartition(" ")[2])


def test_a_chain_of_signalled_elements_ends_as_the_quiet_run_and_the_rest_exit_at_once(site: Site, quiet: Path) -> None:
    run = site.run("chain")
    chain = site.train("chain", options=("--array=1-4%1",))
    signal_at(site, f"{chain}_1", "chain", 3)
    assert site.ends(f"{chain}_1") == "COMPLETED", site.said(f"{chain}_1")
    first = stopped_at(run)
    signal_at(site, f"{chain}_2", "chain", first + 3)
    assert site.ends(f"{chain}_2") == "COMPLETED", site.said(f"{chain}_2")
    assert first < stopped_at(run) < steps(quiet)[-1]["step"]
    assert site.ends(f"{chain}_4") == "COMPLETED", site.said(f"{chain}_4")
    assert "this run is finished" in site.said(f"{chain}_4")
    assert "this run is finished" not in site.said(f"{chain}_3")
    assert_same_run(run, quiet)


def test_a_job_with_requeue_goes_on_under_its_own_number(site: Site, quiet: Path) -> None:
    job = site.train("requeued", "--requeue")
    signal_at(site, job, "requeued", 5)
    site.cluster.wait("the second start", lambda: site.cluster.restarts(job) == 1, 60)
    assert site.ends(job) == "COMPLETED", site.said(job)
    assert f"job {job} is queued again" in site.said(job)
    assert site.said(job).count("doctor: ") == 2, site.said(job)  # both starts in one output
    assert_same_run(site.run("requeued"), quiet)


def test_a_preempted_element_is_queued_again_and_the_next_one_may_go_on_meanwhile(site: Site, quiet: Path) -> None:
    chain = site.train("preempted", options=("--array=1-2%1",))
    site.wait_for_step("preempted", 5)
    urgent = site.cluster.submit("--partition=high", "--nodes=2", "--exclusive", f"--output={site.folder}/urgent.out", "--wrap", "sleep 1")
    assert site.ends(urgent) == "COMPLETED"
    assert not (site.run("preempted") / "done").exists()
    assert [site.ends(f"{chain}_{element}") for element in (1, 2)] == ["COMPLETED"] * 2, site.said(f"{chain}_1") + site.said(f"{chain}_2")
    assert site.cluster.restarts(f"{chain}_1") == 1
    assert_same_run(site.run("preempted"), quiet)


def test_the_time_limit_signals_early_enough_to_save(site: Site) -> None:
    """SLURM looks at limits every half minute and signals up to a minute early: here half a minute to a whole one after the start."""
    job = site.train("limited", "--epochs", "4000", options=("--time=2", "--signal=USR2@60"))
    assert site.ends(job) == "COMPLETED", site.said(job)
    assert "SIGUSR2: asked to end; saved at step" in site.said(job)
