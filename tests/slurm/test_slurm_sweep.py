"""A sweep in two links by slurm/submit.sh: a run that is finished, one that is signalled and one that is killed, and all of them in the end."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.site import FLAGS, ROOT, Site

pytestmark = pytest.mark.slurm
NAMES = ("seed-1_epochs-1", "seed-2", "seed-3")
LINES = "--seed 1 --epochs 1\n\n--seed 2  # the one that is signalled\n--seed 3\n"


def submit(site: Site, links: int, sweep: Path) -> tuple[list[str], str]:
    """The numbers of all links' arrays, and what submit.sh said."""
    options = (site.exported(), f"--output={site.folder}/%j.out", "--array=1-3", "--gres=none", "--cpus-per-task=1")
    flags = ("--sweep", sweep, "--dataset-home", site.shards, "--logger-folder", site.run("sweep"), *FLAGS)
    said = site.cluster.run("slurm/submit.sh", str(links), *options, "slurm/train.sbatch", *flags, cwd=ROOT)
    return re.findall(r": job (\d+)", said), said


def test_a_sweep_of_two_links_continues_every_run_and_the_same_submit_again_the_killed_one(site: Site, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(LINES)
    runs = [site.run("sweep") / name for name in NAMES]
    (first, second), said = submit(site, 2, sweep)
    assert f"link 2 of 2: job {second}, after job {first}" in said
    for element, name in ((2, "USR2"), (3, "KILL")):
        site.wait_for_step(f"sweep/{NAMES[element - 1]}", 3)
        site.cluster.run("scancel", f"--signal={name}", f"{site.cluster.number(f'{first}_{element}')}.0")
    assert [site.ends(f"{first}_{element}") for element in (1, 2, 3)] == ["COMPLETED", "COMPLETED", "FAILED"], site.said(f"{first}_3")
    assert [site.ends(f"{second}_{element}") for element in (1, 2, 3)] == ["COMPLETED", "COMPLETED", "CANCELLED"], site.said(f"{second}_2")
    assert "this run is finished" in site.said(f"{second}_1")
    assert [(run / "done").exists() for run in runs] == [True, True, False]

    (third,), _ = submit(site, 1, sweep)
    assert [site.ends(f"{third}_{element}") for element in (1, 2, 3)] == ["COMPLETED"] * 3, site.said(f"{third}_3")
    assert all((run / "done").exists() for run in runs)
    assert not list(site.run("sweep").rglob("predictions-test.csv"))
    assert {path.name for path in site.run("sweep").iterdir()} == set(NAMES)


def test_submit_says_how_it_is_used(site: Site) -> None:
    for words in ((), ("slurm/train.sbatch",), ("0", "slurm/train.sbatch"), ("2",)):
        done = subprocess.run(["slurm/submit.sh", *words], cwd=ROOT, env=site.cluster.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "usage: slurm/submit.sh LINKS" in done.stderr
