"""One cluster for all of these tests, one packed home, and one quiet run that the others are compared with."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clips.clip import ClipSpec
from clips.synthetic import write_snippets
from convert.pack import PackConfig, pack
from tests.slurm.cluster import Cluster
from tests.slurm.site import Site

# FAULT spoils every rank but the first: what a broken node or a wrong variable would do there.
PYTHON = f"""#!/bin/sh
[ "${{SLURM_PROCID:-0}}" = 0 ] || eval "$FAULT"
exec {sys.executable} "$@"
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, Cluster(Path(folder)) as started:
        yield started


@pytest.fixture(scope="session")
def snippets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snippets(tmp_path_factory.mktemp("snippets"), 80, ClipSpec(16, 64, 64))


@pytest.fixture(scope="session")
def shards(snippets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "shards"
    pack(PackConfig(snippets, output, shard_mib=0.5, workers=1))
    return output


@pytest.fixture(scope="session")
def site(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """An environment for env.sh to activate: this very interpreter, under the name python."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "python").write_text(PYTHON)
    (folder / "venv" / "bin" / "python").chmod(0o755)
    (folder / "venv" / "bin" / "activate").write_text(f"PATH={folder}/venv/bin:$PATH\n")
    return Site(cluster, folder, shards)


@pytest.fixture(scope="session")
def quiet(site: Site) -> Path:
    """The folder of a run that nobody disturbed."""
    job = site.train("quiet")
    assert site.ends(job) == "COMPLETED", site.said(job)
    return site.run("quiet")
