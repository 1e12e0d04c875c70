"""The decoding process beside the training: passes left and begun again, deaths on either side, and nothing left behind."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain, count
from multiprocessing.connection import Pipe
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from clips.errors import ClipError, InputError
from loaders.beside import Beside, Job, Message, _say, _shared_memory
from loaders.decode import Effort
from loaders.plan import Plan
from loaders.requests import Pass, Recipe
from loaders.sample import AugmentConfig
from loaders.source import ClipSource, open_source
from loaders.stream import Loader
from tests import by_hand
from tests.loading import MANY_SHARDS_MIB, SEED, Found, assert_same, by_key, decoding_processes, keys_in, keys_of, npz_home, opened, shards
from tests.sources import FATAL, Crowded, Dividing, Dying, Gated

ROOT = Path(__file__).parents[1]
LIMIT_S = 20  # on any machine; what hangs fails its test then
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TRAINING = """
import sys
from pathlib import Path
import numpy as np
from loaders.beside import Beside, Job
from loaders.decode import Effort
from loaders.plan import Plan
from loaders.requests import Pass, Recipe
from loaders.sample import AugmentConfig
from loaders.source import open_source
source = open_source(Path(sys.argv[1]), "train")
recipe = Recipe(Plan(21, 4, 2, 0), 5, AugmentConfig(), np.arange(21))
batches = Beside(Job(source, recipe, Effort(2, 2, 8), True, (3, 2, 5, *source.stored.video_shape[1:]), None, 0)).run(Pass(0))
next(batches)
print("reading", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still waiting after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.getbasetemp(), "zstd", MANY_SHARDS_MIB)


@pytest.fixture(scope="module")
def whole(packed: Path) -> Found:
    """An epoch as threads of this process give it."""
    with opened(packed, decode_in="threads") as made:
        return by_key(made.training(1))


@pytest.fixture(scope="module")
def made(packed: Path) -> Iterator[Loader]:
    """One for all tests that leave it alive."""
    with opened(packed, decode_in="process") as loader:
        yield loader


def held_memory() -> list[str]:
    """Where this process still holds memory that it shared."""
    descriptors = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [line for line in [*descriptors, *Path("/proc/self/maps").read_text().splitlines()] if "gesture-clips" in line]


def test_a_resume_at_every_step_gives_the_same_tail(made: Loader, whole: Found) -> None:
    for step in range(6):
        assert_same(by_key(made.training(1, consumed=4 * step)), dict(list(whole.items())[4 * step :]))


def test_a_pass_left_at_any_batch_spoils_no_later_one(made: Loader, whole: Found) -> None:
    for place in range(10):
        for number, _ in enumerate(made.training(0)):
            if number == place:
                break
        if place % 3 == 0:
            assert_same(by_key(made.training(1)), whole)


def test_a_later_pass_ends_the_former_which_says_so(made: Loader, whole: Found) -> None:
    former = made.training(0)
    next(former)
    later = made.training(1)
    first = next(later)
    with pytest.raises(RuntimeError, match="ended by a later one"):
        next(former)
    assert_same(by_key(chain([first], later)), whole)


def test_an_evaluation_ends_in_a_short_batch(made: Loader) -> None:
    assert [len(batch) for batch in made.evaluation()] == [2] * 10 + [1]


def test_the_process_has_no_torch(made: Loader) -> None:
    keys_in(made.training(0))
    (child,) = decoding_processes()
    assert "libtorch" not in Path(f"/proc/{child}/maps").read_text()


def test_signals_for_the_training_disturb_no_batch_from_the_first_moment_on(packed: Path, whole: Found) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    others = decoding_processes()
    with opened(packed, decode_in="process") as loader:
        (child,) = set(decoding_processes()) - set(others)
        send_all(child)  # before its first line
        batches = loader.training(1)
        first = next(batches)
        send_all(child)
        assert_same(by_key(chain([first], batches)), whole)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked


def send_all(process: int) -> None:
    for number in SIGNALS:
        os.kill(process, number)


@pytest.mark.parametrize(("number", "how"), [(signal.SIGKILL, "was ended by signal 9"), (0, "ended with code 3")])
def test_a_process_that_ends_while_a_batch_is_awaited_is_an_error_that_says_how(packed: Path, number: int, how: str) -> None:
    with opened(packed, decode_in="process", around=partial(Dying, signal=number)) as loader:
        for _ in range(2):
            with pytest.raises(InputError, match=rf"^the decoding process \d+ {how}; expected it to live .* then run the same command again\.$"):
                keys_in(loader.evaluation())
        loader.close()


@pytest.mark.parametrize("is_reading", [True, False])
def test_a_process_killed_between_batches_or_passes_is_an_error_too(packed: Path, is_reading: bool) -> None:
    others = decoding_processes()
    with opened(packed, decode_in="process") as loader:
        batches = loader.training(0)
        next(batches)
        if not is_reading:
            keys_in(batches)
        (child,) = set(decoding_processes()) - set(others)
        os.kill(child, signal.SIGKILL)
        with pytest.raises(InputError, match=f"the decoding process {child} was ended by signal 9"):
            keys_in(batches if is_reading else loader.training(1))
    assert decoding_processes() == others


def test_the_process_goes_with_a_training_that_is_killed(packed: Path) -> None:
    """Its end of the pipes closes with it."""
    pipe = subprocess.PIPE
    training = subprocess.Popen([sys.executable, "-c", TRAINING, packed], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert training.stdout is not None and training.stdout.readline() == "reading\n"
    assert len(decoding_processes(training.pid)) == 1
    training.kill()
    assert training.communicate(timeout=LIMIT_S) == ("", "")


@pytest.mark.parametrize("num_batches", [0, 1, 7])
def test_nothing_is_left_after_close_in_the_middle_of_a_pass(packed: Path, num_batches: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = (decoding_processes(), held_memory(), threading.enumerate(), sorted(os.listdir("/proc/self/fd")))
    with opened(packed, decode_in="process") as loader:
        batches = loader.training(0)
        for _ in range(num_batches):
            next(batches)
        assert len(decoding_processes()) == len(before[0]) + 1 and len(held_memory()) > len(before[1])
        loader.close()
        del batches
        assert (decoding_processes(), held_memory(), threading.enumerate(), sorted(os.listdir("/proc/self/fd"))) == before
    assert capfd.readouterr().err == ""


def test_an_error_of_ours_arrives_with_its_traceback_as_often_as_it_comes(packed: Path) -> None:
    keys = keys_of(npz_home(packed.parent))
    with opened(packed, decode_in="process", around=Dividing) as loader:
        for _ in range(5):  # more often than there are buffers
            seen: list[str] = []
            with pytest.raises(RuntimeError, match=r"(?s)in the decoding process: Traceback.*sources\.py.*ZeroDivisionError"):
                for batch in loader.evaluation():
                    seen += batch.key
            assert seen == keys[:FATAL]


def test_a_pass_that_was_left_is_not_decoded_to_its_end(packed: Path) -> None:
    """Evaluation would come to the fatal clip, the rest of this epoch does not."""
    epoch = next(epoch for epoch in count() if FATAL not in by_hand.permutation(21, "order", SEED, epoch)[16:20])
    with opened(packed, decode_in="process", prefetch=1, look_ahead=0, around=partial(Dying, signal=0)) as loader:
        next(loader.evaluation())
        assert len(keys_in(loader.training(epoch, consumed=16))) == 4


def test_a_rank_without_clips_has_an_empty_evaluation_and_too_large_a_batch_is_the_users_error(packed: Path) -> None:
    several = {"split": "val", "batch_size": 8, "micro_batch": 1, "world_size": 8}
    with opened(packed, decode_in="process", **several) as loader:  # type: ignore[arg-type]  # strings and numbers
        assert list(loader.evaluation()) == []
        with pytest.raises(InputError, match=r"^--batch-size 8: an epoch has 7 clips, not enough for one step\. Give fewer ranks than 8, or more clips"):
            next(loader.training(0))
        assert list(loader.evaluation()) == []


def test_more_points_than_the_channel_holds_at_once(packed: Path, whole: Found, capfd: pytest.CaptureFixture[str]) -> None:
    with opened(packed, decode_in="process", around=Crowded) as loader:
        for _ in range(3):
            next(loader.training(0))
        assert_same(by_key(loader.training(1)), whole)
        next(loader.training(0))
    assert capfd.readouterr().err == ""  # though it was in the middle of a message


def test_a_shard_that_is_gone_when_the_process_opens_it_is_the_users_error(packed: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(packed, tmp_path / "shards"))
    path = home / "train" / "train-000001.tar"

    def then_gone(source: ClipSource) -> ClipSource:
        path.unlink()
        return source

    with opened(home, decode_in="process", around=then_gone) as loader, pytest.raises(ClipError, match=f"^{re.escape(str(path))}: cannot be opened"):
        next(loader.training(0))


def test_a_folder_where_nothing_can_be_staged_is_the_users_error(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--stage-dir"), opened(packed, decode_in="process", stage_dir=tmp_path / "file") as loader:
        next(loader.training(0))


def test_a_source_that_cannot_be_sent_leaves_nothing(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (decoding_processes(), held_memory())
    with pytest.raises(TypeError, match="pickle"), opened(packed, decode_in="process", around=partial(Gated, note=print)):
        pass
    assert (decoding_processes(), held_memory()) == before
    assert capfd.readouterr().err == ""


def job_of(source: ClipSource) -> Job:
    recipe = Recipe(Plan(21, 4, 2, SEED), 5, AugmentConfig(), np.arange(21))
    return Job(source, recipe, Effort(2, 2, 8), True, (3, 2, 5, *source.stored.video_shape[1:]), None, 0)


def test_a_process_that_does_not_understand_ends_instead_of_falling_silent(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(open_source(packed, "train")) as source, closing(Beside(job_of(source))) as beside:
        beside._channel.send_bytes(b"no pickle")
        with pytest.raises(InputError, match="ended with code 1"):
            list(beside.run(Pass(0)))
    assert "UnpicklingError" in capfd.readouterr().err


def test_a_message_that_nobody_hears_ends_the_process_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    ours, theirs = Pipe()
    theirs.close()
    with ours, pytest.raises(SystemExit, match="0"):
        _say(ours, Message(1))


def test_what_pins_the_memory_is_taken_back_once(packed: Path) -> None:
    told: list[str] = []

    def pin(slots: np.ndarray) -> Callable[[], None]:
        told.append(f"pin {slots.shape}")
        return partial(told.append, "unpin")

    with closing(open_source(packed, "train")) as source, closing(Beside(job_of(source), pin)) as beside:
        beside.close()
    assert told == ["pin (3, 2, 5, 24, 32, 3)", "unpin"]


def test_too_much_memory_is_the_users_error_and_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match=r"^\d+ MiB of memory for decoded batches; this machine has \d+\. Take a smaller --prefetch or --micro-batch\.$"):
        _shared_memory((1 << 40, 1 << 40))

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"^3 MiB of memory for decoded batches: No space left on device\. Take"):
        _shared_memory((3, 1 << 20))
    assert sorted(os.listdir("/proc/self/fd")) == before
