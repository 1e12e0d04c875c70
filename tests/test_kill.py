"""pack killed, interrupted and robbed of a worker, in real processes: the same command again gives the bytes of one quiet run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.making import write_home
from tests.packing import tree

ROOT = Path(__file__).parent.parent
KILLS = 20
LONG_ENOUGH_S = 60


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A home that makes 80 shards of one clip, and all files of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    home = write_home(folder, {"train": {"a": 40, "b": 30}, "val": {"a": 10}}, frames=6, height=48, width=48)
    assert start(home, folder / "out").wait(LONG_ENOUGH_S) == 0
    files = tree(folder / "out")
    assert sum(name.endswith(".tar") for name in files) == 80
    assert not [name for name in files if name.split("/")[-1].startswith(".")]
    return home, files


def start(home: Path, output: Path, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """pack in a session of its own, so that its whole group can be killed."""
    command = [sys.executable, "-m", "convert", "pack", "--dataset-home", home, "--output", output, "--codec", "zstd", "--shard-mib", "0.05", "--workers", "2"]
    return subprocess.Popen([*map(str, command)], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end with the test, whatever happens in it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()


def wait_for(fact: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the fact holds or the process has ended."""
    end = time.monotonic() + LONG_ENOUGH_S
    while not fact() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def num_shards(output: Path) -> int:
    return len(list(output.rglob("*.index.mp")))


def has_more_than(output: Path, before: int) -> bool:
    return num_shards(output) > before


def members_of_session(session: int) -> dict[int, str]:
    """Process to command line of everyone in the session who is not dead."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found[int(folder.name)] = (folder / "cmdline").read_text()
            except OSError:
                continue  # it ended meanwhile
    return found


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, line in members_of_session(process.pid).items() if "spawn_main" in line]


@pytest.mark.slow
def test_a_pack_killed_at_twenty_moments_ends_with_the_bytes_of_a_quiet_run(
    quiet: tuple[Path, dict[str, bytes]], tmp_path: Path, running: list[subprocess.Popen[str]]
) -> None:
    home, expected = quiet
    output = tmp_path / "out"
    chance = random.Random(7)
    kills = kills_among_shards = 0
    while kills < KILLS:
        before = num_shards(output)
        process = start(home, output)
        running.append(process)
        if kills % 2:  # odd ones while shards are written, even ones from the first claim on
            wait_for(partial(has_more_than, output, before), process)
        else:
            wait_for(lambda: output.is_dir() and bool(list(output.glob(".share-*"))), process)
        time.sleep(chance.uniform(0, 0.3 if kills % 2 else 0.9))
        kill_group(process)
        kills += process.returncode == -signal.SIGKILL
        found = tree(output)
        whole = {name: blob for name, blob in found.items() if not name.split("/")[-1].startswith(".")}
        assert all(expected.get(name) == blob for name, blob in whole.items())  # what has its name is complete
        kills_among_shards += 0 < num_shards(output) < 80
        if process.returncode == 0:
            assert found == expected
            shutil.rmtree(output)
    assert kills_among_shards >= KILLS // 3
    assert start(home, output).wait(LONG_ENOUGH_S) == 0
    assert tree(output) == expected


@pytest.mark.slow
def test_no_worker_outlives_a_killed_main_process(quiet: tuple[Path, dict[str, bytes]], tmp_path: Path, running: list[subprocess.Popen[str]]) -> None:
    home, expected = quiet
    output = tmp_path / "out"
    process = start(home, output)
    running.append(process)
    wait_for(lambda: num_shards(output) > 2, process)
    assert len(workers_of(process)) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while members_of_session(process.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert members_of_session(process.pid) == {}
    assert start(home, output).wait(LONG_ENOUGH_S) == 0  # the claim of a dead process of this machine blocks nobody
    assert tree(output) == expected


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_line(quiet: tuple[Path, dict[str, bytes]], tmp_path: Path, running: list[subprocess.Popen[str]]) -> None:
    home, expected = quiet
    output = tmp_path / "out"
    process = start(home, output, subprocess.PIPE)
    running.append(process)
    wait_for(lambda: num_shards(output) > 2, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=LONG_ENOUGH_S)
    assert process.returncode == 2 and "Traceback" not in errors
    assert errors.endswith("error: pack: a worker was killed, probably for want of memory. Run the same command again with fewer --workers.\n")
    assert not list(output.glob(".share-*")) and not (output / "manifest.json").exists()
    assert start(home, output).wait(LONG_ENOUGH_S) == 0
    assert tree(output) == expected


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_leaves_neither_claim_nor_temporary_file(
    quiet: tuple[Path, dict[str, bytes]], tmp_path: Path, running: list[subprocess.Popen[str]], ending: signal.Signals
) -> None:
    home, expected = quiet
    output = tmp_path / "out"
    process = start(home, output, subprocess.PIPE)
    running.append(process)
    wait_for(lambda: num_shards(output) > 2, process)
    os.killpg(process.pid, ending)  # as a terminal and scancel do: to everyone
    _, errors = process.communicate(timeout=LONG_ENOUGH_S)
    assert process.returncode == 130 and errors.endswith("interrupted; the same command again continues\n")
    assert "Traceback" not in errors, errors
    assert not [name for name in tree(output) if name.split("/")[-1].startswith(".")]
    assert start(home, output).wait(LONG_ENOUGH_S) == 0
    assert tree(output) == expected
