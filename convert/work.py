"""One share's shards, packed by processes; a process packs whole shards, threads of its own where there are few of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from clips.codecs import Codec
from clips.errors import InputError
from clips.npz import BadNpz
from clips.snippets import Bad, Snippet

from .encode import EncodedClip, Recipe, encode_clip
from .pool import count, in_processes
from .sharding import SplitPlan, mended_sizes
from .writer import write_shard

CLIPS_IN_FLIGHT = 2  # per thread: one being written, one being read


def pack_shards(home: Path, output: Path, recipe: Recipe, jobs: Sequence[tuple[SplitPlan, int]], workers: int, most_bad: int) -> list[Bad]:
    """Writes the shards and gives the bad snippets, sorted; stops early once there are more than `most_bad`."""
    threads = -(-workers // max(1, min(workers, len(jobs))))
    calls = [
        (home, output, plan.split, plan.shard_name(number), plan.plan_id, plan.shards[number], mended_sizes(plan, number), recipe, threads)
        for plan, number in jobs
    ]
    bad: list[Bad] = []
    for found in in_processes(_pack_shard, calls, workers, sum(len(plan.shards[number]) for plan, number in jobs), "pack"):
        bad += found
        if len(bad) > most_bad:
            break
    return sorted(bad, key=lambda one: one.path)


def _pack_shard(
    home: Path, output: Path, split: str, name: str, plan_id: str, snippets: Sequence[Snippet], mended: Mapping[str, int], recipe: Recipe, threads: int
) -> list[Bad]:
    """Writes one shard, in a worker, with a hole for each bad snippet, which its index names."""
    bad: list[Bad] = []
    try:
        with ThreadPoolExecutor(threads) as pool:
            write_shard(output, split, name, plan_id, _encoded(pool, threads, home, snippets, recipe, bad), bad, mended)
    except OSError as error:
        raise InputError(f"{output / split / name}: cannot be written ({error.strerror or error}). Make space, then run the same command.") from error
    return bad


def _encoded(pool: ThreadPoolExecutor, threads: int, home: Path, snippets: Sequence[Snippet], recipe: Recipe, bad: list[Bad]) -> Iterator[EncodedClip]:
    """The clips in order, encoded a few ahead; those that cannot be used go to `bad`."""
    codec = recipe.make_codec()
    ahead: deque[tuple[Snippet, Future[EncodedClip]]] = deque()
    waiting = iter(snippets)
    while True:
        while len(ahead) < CLIPS_IN_FLIGHT * threads - 1 and (snippet := next(waiting, None)) is not None:
            ahead.append((snippet, pool.submit(_encode, home, snippet, recipe, codec)))
        if not ahead:
            return
        snippet, future = ahead.popleft()
        try:
            clip = future.result()
        except BadNpz as error:
            bad.append(Bad(snippet.path, str(error)))
        else:
            yield clip
        count()


def _encode(home: Path, snippet: Snippet, recipe: Recipe, codec: Codec) -> EncodedClip:
    if reason := changed(home, snippet):
        raise BadNpz(reason)
    return encode_clip(home, snippet, recipe, codec)


def changed(home: Path, snippet: Snippet) -> str | None:
    """Why the file is not the one that was planned, or None."""
    try:
        found = (home / snippet.path).stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if found == snippet.file_bytes else f"changed since the pack was planned: {snippet.file_bytes} bytes then, {found} now"
