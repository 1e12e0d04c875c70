"""Conversion under SLURM: as one job, and as an array of which one element is killed and sent again; both give the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.site import Site

pytestmark = pytest.mark.slurm
ELEMENTS = 3
SHARD_MIB = ("--shard-mib", "0.2")  # a dozen shards


@pytest.fixture(scope="module")
def one_job(site: Site, snippets: Path) -> Path:
    """The folder that a single job packed and verified."""
    output = site.folder / "one-job"
    job = site.send("convert.sbatch", (), "--dataset-home", snippets, "--output", output, *SHARD_MIB)
    assert site.ends(job) == "COMPLETED", site.said(job)
    assert "11 shards checked, 0 problems" in site.said(job), site.said(job)
    return output


def send_array(site: Site, snippets: Path, output: Path) -> str:
    return site.send("convert.sbatch", (f"--array=0-{ELEMENTS - 1}",), "--dataset-home", snippets, "--output", output, "--workers", "2", *SHARD_MIB)


def files(folder: Path) -> dict[str, bytes]:
    """All bytes but those of verified.json, which says when."""
    return {path.relative_to(folder).as_posix(): b"" if path.name == "verified.json" else path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_array_with_a_killed_element_sent_again_gives_the_bytes_of_one_job(site: Site, snippets: Path, one_job: Path) -> None:
    cluster, output = site.cluster, site.folder / "array"
    first = send_array(site, snippets, output)
    waiting = site.send("convert.sbatch", (f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes"), "merge", output)
    cluster.wait("the claim of share 1", lambda: bool([*output.glob(f".*1*{ELEMENTS}*claim*")]), 60)
    cluster.run("scancel", "--signal=KILL", f"{first}_1.0")
    assert [site.ends(f"{first}_{element}") for element in range(ELEMENTS)] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert site.ends(waiting) == "CANCELLED"  # nothing is merged that is not whole
    assert not (output / "manifest.json").exists()

    again = send_array(site, snippets, output)
    merging = site.send("convert.sbatch", (f"--dependency=afterok:{again}", "--kill-on-invalid-dep=yes"), "merge", output)
    checking = site.send("convert.sbatch", (f"--dependency=afterok:{merging}", "--kill-on-invalid-dep=yes"), "verify", output, "--dataset-home", snippets)
    assert site.ends(checking) == "COMPLETED", site.said(again) + site.said(merging) + site.said(checking)
    assert files(output) == files(one_job)
    assert "0 shards" in site.said(f"{again}_0"), site.said(f"{again}_0")  # what the others had done stayed
