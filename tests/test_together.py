"""Together in real processes, without torch: whatever ends one rank ends all, each with one line, and nothing else does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from training.together import Together, admit, call, in_words, open_hub

SHORT_S = 0.3  # that one rank waits for what it must not see, or the hub for more reasons
LIMIT_S = 60  # on any machine; a rank that hangs fails its test then
DEATH = "killed, out of memory or cut off; its own log or the scheduler's may say more"
CHILD = """
import ctypes, sys, threading
import training.together
from clips import command
from clips.environment import Ranks
from clips.errors import InputError
from training.together import Together, admit, call, open_hub

def block():
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    inside = threading.Event()
    threading.Thread(target=lambda: inside.wait() and print("block", flush=True), daemon=True).start()
    sys.setswitchinterval(60)
    inside.set()  # the thread gets Python's lock when the next line lets go of it, and not before
    libc.pthread_mutex_lock(mutex)  # for ever, deaf to signals: as a collective whose peer is gone

def compute():
    while True:
        pass

def fail(text):
    raise InputError(text)

def crash(text):
    raise RuntimeError(text)

def main():
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    training.together.GRACE_S, training.together.SIGNAL_S = float(sys.argv[4]), 0.3
    if rank == 0:
        listener = open_hub()
        print(listener.getsockname()[1], flush=True)
        hub = admit(listener, size, "token", 60)
    else:
        hub = call("127.0.0.1", int(sys.argv[3]), "token", rank, 60)
    with Together(Ranks(rank, size, rank, size, "torchrun"), None, hub) as others:
        others.last_words = lambda reason: print("last words:", reason, flush=True)
        print("ready", flush=True)
        for line in sys.stdin:
            verb, _, text = line.strip().partition(" ")
            if verb != "block":
                print(verb, flush=True)
            {"block": block, "compute": compute, "fail": fail, "crash": crash, "exit": sys.exit}[verb](*[text][: bool(text)])

sys.exit(command.run(main))
"""


class Rank:
    """One process; `do` tells it what its main thread does next, `finish` lets it come to its clean end."""

    def __init__(self, rank: int, size: int, grace_s: float, port: str = "") -> None:
        command = [sys.executable, "-c", CHILD, str(rank), str(size), port, str(grace_s)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        assert self.hear() == what.split()[0]

    def finish(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None  # `communicate` would flush it

    def end(self) -> tuple[int, str]:
        """The exit code and what it said on stderr."""
        _, said = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, said


class Launch(Protocol):
    def __call__(self, size: int, grace_s: float = SHORT_S) -> list[Rank]: ...


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts ranks that have met."""
    started: list[Rank] = []

    def start(size: int, grace_s: float = SHORT_S) -> list[Rank]:
        started.append(Rank(0, size, grace_s))
        port = started[0].hear()
        started.extend(Rank(rank, size, grace_s, port) for rank in range(1, size))
        assert [rank.hear() for rank in started] == ["ready"] * size
        return started

    yield start
    for rank in started:
        rank.process.kill()
        rank.process.communicate()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_wherever_their_main_threads_are(launch: Launch, killed: int) -> None:
    ranks = launch(3, LIMIT_S)
    for rank, what in zip((rank for rank in range(3) if rank != killed), ("block", "compute"), strict=True):
        ranks[rank].do(what)
    ranks[killed].process.kill()
    for rank in {0, 1, 2} - {killed}:
        assert ranks[rank].end() == (2, f"error: rank {killed} of 3 ended: {DEATH}. Rank {rank} ends too.\n")


def test_an_error_of_one_rank_is_told_by_that_rank_and_names_the_cause_on_the_others(launch: Launch) -> None:
    ranks = launch(3)
    ranks[0].do("block")
    ranks[2].do("compute")
    ranks[1].do("fail shard 7: clip x is cut short")
    assert ranks[1].end() == (2, "error: shard 7: clip x is cut short\n")
    assert ranks[0].end() == (2, "error: rank 1 of 3 ended: shard 7: clip x is cut short. Rank 0 ends too.\n")
    assert ranks[2].end() == (2, "error: rank 1 of 3 ended: shard 7: clip x is cut short. Rank 2 ends too.\n")


def test_a_mistake_that_all_ranks_find_is_said_once(launch: Launch) -> None:
    ranks = launch(3, LIMIT_S)
    for rank in reversed(ranks):
        rank.do("fail no split train")
    assert [rank.end() for rank in ranks] == [(2, "error: no split train\n"), (2, ""), (2, "")]


def test_ranks_with_different_errors_each_say_their_own(launch: Launch) -> None:
    ranks = launch(2, LIMIT_S)
    ranks[0].do("fail this")
    ranks[1].do("fail that")
    assert [rank.end() for rank in ranks] == [(2, "error: this\n"), (2, "error: that\n")]


def test_a_crash_keeps_its_traceback_on_its_own_rank_alone(launch: Launch) -> None:
    ranks = launch(2)
    ranks[1].do("block")
    ranks[0].do("crash out of range")
    code, said = ranks[0].end()
    assert code == 2 and said.startswith("Traceback") and said.endswith("RuntimeError: out of range\n")
    assert ranks[1].end() == (2, "error: rank 0 of 2 ended: RuntimeError: out of range. Rank 1 ends too.\n")


def test_a_collective_that_breaks_by_a_ranks_death_is_not_told_as_a_crash(launch: Launch) -> None:
    ranks = launch(3, LIMIT_S)
    ranks[0].do("crash Connection closed by peer")
    ranks[2].do("crash Connection closed by peer")
    ranks[1].process.kill()
    for rank in (0, 2):
        assert ranks[rank].end() == (2, f"error: rank 1 of 3 ended: {DEATH}. Rank {rank} ends too.\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["block", "compute"])
def test_a_signal_to_one_rank_ends_all(launch: Launch, what: str, number: int) -> None:
    ranks = launch(2)
    ranks[0].do("block")
    ranks[1].do(what)
    ranks[1].process.send_signal(number)
    assert ranks[1].end() == (130, "interrupted; the same command again continues\n")
    assert ranks[0].end() == (2, "error: rank 1 of 2 ended: interrupted. Rank 0 ends too.\n")


@pytest.mark.parametrize("what", ["block", "compute"])
def test_a_signal_to_all_ranks_is_said_once(launch: Launch, what: str) -> None:
    ranks = launch(2, LIMIT_S)
    for rank, verb in zip(ranks, ("compute", what), strict=True):
        rank.do(verb)
    for rank in ranks:
        rank.process.send_signal(signal.SIGTERM)
    assert [rank.end() for rank in ranks] == [(130, "interrupted; the same command again continues\n"), (130, "")]


def test_at_a_clean_end_the_ranks_wait_for_the_last(launch: Launch) -> None:
    ranks = launch(3)
    ranks[1].finish()
    ranks[2].do("exit")
    with pytest.raises(subprocess.TimeoutExpired):
        ranks[1].process.wait(timeout=2 * SHORT_S)
    ranks[0].finish()
    assert [rank.end() for rank in ranks] == [(0, "")] * 3


def test_a_rank_that_waits_at_its_clean_end_hears_of_a_death(launch: Launch) -> None:
    ranks = launch(2)
    ranks[1].finish()
    ranks[0].process.kill()
    assert ranks[1].end() == (2, f"error: rank 0 of 2 ended: {DEATH}. Rank 1 ends too.\n")


def test_a_stopped_rank_is_not_a_dead_one(launch: Launch) -> None:
    ranks = launch(2)
    for rank in ranks:
        rank.process.send_signal(signal.SIGSTOP)
        os.waitpid(rank.process.pid, os.WUNTRACED)
    ranks[0].process.send_signal(signal.SIGCONT)
    ranks[0].finish()
    with pytest.raises(subprocess.TimeoutExpired):
        ranks[0].process.wait(timeout=2 * SHORT_S)
    ranks[1].process.send_signal(signal.SIGCONT)
    ranks[1].finish()
    assert [rank.end() for rank in ranks] == [(0, "")] * 2


def test_last_words_hold_the_reason(launch: Launch) -> None:
    ranks = launch(2)
    ranks[0].do("block")
    ranks[1].do("fail clip x")
    assert [rank.hear() for rank in ranks] == ["last words: rank 1 of 2 ended: clip x.", "last words: clip x"]


def test_alone_there_is_nobody_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    words: list[str] = []
    with Together():
        pass
    with pytest.raises(KeyError), Together() as alone:
        alone.last_words = words.append
        raise KeyError("x")
    assert words == ["KeyError: 'x'"] and capsys.readouterr().err == ""


def test_a_stranger_at_the_hubs_port_is_turned_away() -> None:
    with open_hub() as listener:
        port = listener.getsockname()[1]
        stranger = socket.create_connection(("127.0.0.1", port), LIMIT_S)
        stranger.sendall(b"GET /\n")
        thread = threading.Thread(target=lambda: members.append(admit(listener, 2, "token", LIMIT_S)))
        members = [call("127.0.0.1", port, "token", 1, LIMIT_S)]
        thread.start()
        thread.join()
    assert stranger.recv(1) == b""
    for member in (*members, stranger):
        member.close()


def test_missing_ranks_are_not_awaited_for_ever() -> None:
    with open_hub() as listener, pytest.raises(TimeoutError):
        admit(listener, 2, "token", 0.01)


def test_an_error_is_one_line_for_the_others() -> None:
    assert in_words(ValueError("a\n  b")) == "ValueError: a b"
    assert in_words(KeyboardInterrupt()) == "interrupted"
    assert len(in_words(ValueError("x" * 10_000))) < 600
