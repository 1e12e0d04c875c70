"""The scripts and every command of docs/slurm.md: shellcheck finds nothing, SLURM would take them, and each flag exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.slurm.cluster import need
from tests.slurm.site import ROOT, Site
from training.sweep import read_lines

pytestmark = pytest.mark.slurm
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
# Stand-ins in a folder at the front of PATH: they note their words, and sbatch asks SLURM what it thinks of them. No job with these dependencies exists.
NOTE = '#!/bin/bash\nprintf "%q " "${0##*/}" "$@" >>"$CALLS"\necho >>"$CALLS"\n'
SBATCH = NOTE + (
    "words=()\n"
    'for word in "$@"; do case $word in --parsable | --dependency=* | --kill-on-invalid-dep=*) ;; *) words+=("$word") ;; esac; done\n'
    'PATH=${PATH#*:} sbatch --test-only "${words[@]}" >&2\n'
    "echo 1\n"
)
HELP = {
    "slurm/train.sbatch": ["train.py"],
    "slurm/convert.sbatch": ["-m", "convert", "pack"],
    "slurm/convert.sbatch merge": ["-m", "convert", "merge"],
    "slurm/convert.sbatch verify": ["-m", "convert", "verify"],
    "slurm/bench.sbatch step": ["-m", "benchmarks", "step"],
    "slurm/bench.sbatch loader": ["-m", "benchmarks", "loader"],
}


def test_shellcheck_finds_nothing() -> None:
    need({"shellcheck": "shellcheck"})
    done = subprocess.run(["shellcheck", "-x", *sorted((ROOT / "slurm").iterdir())], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_would_take_the_script_as_it_is(site: Site, script: Path) -> None:
    site.cluster.run("sbatch", "--test-only", script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_resources_the_site_and_one_srun_line(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash -l" and "unset SLURM_EXPORT_ENV" in lines
    assert [line for line in lines if line.startswith("srun ")] == [lines[-1]] and lines[-1].endswith('"$@"')
    assert not re.search(r"\$0|BASH_SOURCE", script.read_text())  # sbatch runs a copy


def test_a_site_file_may_read_what_nobody_set_and_fail_in_passing(site: Site, tmp_path: Path) -> None:
    own = tmp_path / "env.sh"
    own.write_text(f"echo module $NOBODY_SET_THIS\nsource {ROOT}/slurm/env.sh\n[ -f nowhere ] && echo unseen\n")
    job = site.send("convert.sbatch", (site.exported(GESTURE_ENV=str(own)),), "describe", site.shards)
    assert site.ends(job) == "COMPLETED", site.said(job)


def test_a_job_from_another_folder_says_what_to_do(site: Site, tmp_path: Path) -> None:
    job = site.cluster.submit(f"--output={site.folder}/%j.out", ROOT / "slurm" / "convert.sbatch", "describe", site.shards, cwd=tmp_path)
    assert site.ends(job) == "FAILED"
    assert f"{tmp_path}/slurm/env.sh: expected the site's settings. Submit from the project's folder" in site.said(job)


def test_slurm_would_take_the_options_of_every_kind_of_node_on_the_page(site: Site) -> None:
    options = re.findall(r"^\|[^|]*\|[^|]*\| `(--[^`]*--cpus-per-task=\d+)` \|$", (ROOT / "docs" / "slurm.md").read_text(), re.MULTILINE)
    assert len(options) == 8
    for words in options:
        site.cluster.run("sbatch", "--test-only", *words.split(), ROOT / "slurm" / "train.sbatch")


def test_every_command_of_the_page_exists_and_slurm_would_take_its_jobs(site: Site, tmp_path: Path) -> None:
    calls = run_page(site, tmp_path)
    assert len([call for call in calls if call[0] == "sbatch"]) > 15
    unknown = []
    for call in calls:
        script = next((place for place, word in enumerate(call) if word.endswith(".sbatch")), 0)
        if call[0] == "python" or script:
            known = flags_of(*tool(call[1:] if call[0] == "python" else call[script:]))
            unknown += [f"{word} of {shlex.join(call)}" for word in call[script + 1 :] if word.startswith("--") and word not in known]
    assert not unknown
    for name, count in (("lr", 6), ("folds", 5), ("curve", 5)):
        assert len(read_lines(tmp_path / "runs" / f"{name}.txt")) == count


def run_page(site: Site, folder: Path) -> list[list[str]]:
    """The words of every call in the page's bash blocks, run one after another in a folder of their own; fails where one fails."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "slurm.md").read_text(), re.DOTALL | re.MULTILINE)
    (folder / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, **dict.fromkeys(("python", "make", "cp"), NOTE)}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "slurm").symlink_to(ROOT / "slurm")
    environ = site.cluster.environ | {"CALLS": str(folder / "calls"), "PATH": f"{folder}/bin:{site.cluster.environ['PATH']}", "USER": "me"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(blocks)], cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


def tool(words: list[str]) -> tuple[str, ...]:
    """How the tool that gets these words is asked for its help."""
    if words[0].endswith(".sbatch"):
        return tuple(HELP.get(" ".join(words[:2]), HELP.get(words[0], [])))
    return tuple(words[:3] if words[0] == "-m" else words[:1])


@cache
def flags_of(*words: str) -> set[str]:
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=True)
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))
    return found | flags_of("train.py") if "doctor" in words else found
