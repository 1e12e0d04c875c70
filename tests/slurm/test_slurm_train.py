"""Training under SLURM: on two nodes as on one, ended by scancel, and with ranks that never find each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaders.certify import CertifyConfig, certify
from tests.slurm.site import Site, steps

pytestmark = pytest.mark.slurm
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def test_two_nodes_train_in_the_order_and_with_the_losses_of_one_process(site: Site, quiet: Path) -> None:
    job = site.train("two-nodes", options=TWO_NODES)
    assert site.ends(job) == "COMPLETED", site.said(job)
    both = site.run("two-nodes")
    assert "over 2 ranks" in site.said(job)
    assert (both / "certificate.json").read_bytes() == (quiet / "certificate.json").read_bytes()
    assert certify(CertifyConfig(both)) == 0
    for ours, alone in zip(steps(both), steps(quiet), strict=True):
        assert ours == pytest.approx(alone, rel=1e-3), ours["step"]


def test_scancel_leaves_no_process_and_a_run_that_goes_on(site: Site, quiet: Path) -> None:
    job = site.train("cancelled", "--requeue", options=TWO_NODES)
    site.wait_for_step("cancelled", 5)
    site.cluster.run("scancel", job)
    assert site.ends(job) == "CANCELLED"
    site.cluster.wait("the end of all processes", lambda: not site.cluster.processes(), 20)
    assert site.cluster.state(job) == "CANCELLED"  # and is not queued again
    assert "SIGTERM: asked to end; saved at step" in (site.run("cancelled") / "stopped.json").read_text()
    again = site.train("cancelled")
    assert site.ends(again) == "COMPLETED", site.said(again)
    assert steps(site.run("cancelled"))[-1]["step"] == steps(quiet)[-1]["step"]


def test_a_rank_that_dies_at_its_start_ends_the_job_at_once(site: Site) -> None:
    job = site.train("dead", options=(*TWO_NODES, site.exported(FAULT="exit 3")))
    assert site.ends(job) == "FAILED"
    assert site.cluster.ran_s(job) < 30
    assert "task 1: Exited with exit code 3" in site.said(job), site.said(job)


def test_a_rank_that_looks_for_the_others_elsewhere_fails_in_under_a_minute_with_a_clear_line(site: Site) -> None:
    job = site.train("lost", options=(*TWO_NODES, site.exported(FAULT="export SLURM_STEP_NODELIST=n9")))
    assert site.ends(job) == "FAILED"
    assert site.cluster.ran_s(job) < 60
    assert "rank 1 of 2 (srun): expected all ranks at n9:" in site.said(job), site.said(job)
    assert not site.run("lost").exists()
