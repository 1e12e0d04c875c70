"""What the facts mean for the files of a run: flags, clips, stage, runs, weights, versions. Each check is a pure function of the facts."""

from __future__ import annotations

import re
from collections.abc import Callable

from clips.words import counted
from loaders.staging import in_words

from .doctor_checks import Finding
from .doctor_facts import Facts, room_to_stage
from .room import best_bytes, checkpoint_bytes, most_bytes

OVER_THE_NETWORK = re.compile(
    r"(fuse\.)?(nfs\d?|lustre|gpfs|beegfs(_nodev)?|ceph(fs)?|cifs|smb\d?|panfs|weka(fs)?|glusterfs|orangefs|pvfs2|afs|9p|d?fuse|daos|sshfs|juicefs|s3fs|cvmfs2?|rclone)"
)
IN_MEMORY = ("tmpfs", "ramfs")
OF_OPERATORS: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda found, bound: found >= bound,
    "<=": lambda found, bound: found <= bound,
    "==": lambda found, bound: found == bound,
    "!=": lambda found, bound: found != bound,
    ">": lambda found, bound: found > bound,
    "<": lambda found, bound: found < bound,
}


def flags(facts: Facts) -> Finding:
    """The files that hold flags."""
    asked = facts.asked
    if asked.error:
        return Finding("flags", "fail", asked.error.rstrip("."), "repair it before the job starts")
    if asked.sweep is None:
        return Finding("flags", "ok", "no --sweep")
    which = "" if facts.run is None else f", of which this is run {facts.run + 1}"
    return Finding("flags", "ok", f"{asked.sweep}: {counted(len(asked.runs), 'run')}{which}" if asked.runs else f"{asked.sweep}: can be read")


def dataset_home(facts: Facts) -> Finding:
    """Clips that all nodes see, packed."""
    home, job = facts.home, facts.allocation
    if home is None:
        return Finding("dataset home", "ok", "no --dataset-home to look at")
    if facts.home_error:
        return Finding("dataset home", "fail", f"{home.path}: {facts.home_error.rstrip('.')}", "give the folder that python -m convert pack wrote")
    found = f"{home.path} on {home.kind}"
    if home.is_temporary and (job.job is None or job.num_nodes > 1 or job.array is not None):
        advice = "keep it where every node sees it, and give this folder as --stage-dir"
        return Finding("dataset home", "warn", f"{found} is temporary and of this node alone", advice)
    if home.kind in IN_MEMORY:
        return Finding("dataset home", "warn", f"{found} counts against the job's memory", "keep it on a disk")
    if facts.shards is None:
        return Finding("dataset home", "warn", f"{found} holds no shards; inflating npz takes 10 times a decoder's time", "pack it: python -m convert pack")
    return Finding("dataset home", "ok", found)


def shards_and_ranks(facts: Facts) -> Finding:
    if facts.shards is None:
        return Finding("shards", "ok", "none to deal out")
    counts = ", ".join(f"{split} {number}" for split, number in facts.shards.counts.items())
    return Finding("shards", "ok", f"{counts} ({in_words(facts.shards.num_bytes)}); any number of ranks may share them, as clips are dealt and not shards")


def stage_dir(facts: Facts) -> Finding:
    """A folder on the node's own disk, with room."""
    stage, shards = facts.stage, facts.shards
    if stage is None:
        return Finding("stage folder", "ok", "no --stage-dir: shards are read where they lie")
    if str(stage.path) == ".":
        return Finding("stage folder", "fail", "--stage-dir has an empty name", "is $TMPDIR set here? Give a folder on the node's own disk")
    found = f"{stage.path} on {stage.kind}"
    if not stage.writable:
        return Finding("stage folder", "fail", f"{found} cannot be written to", "give a folder of yours on the node's own disk")
    if OVER_THE_NETWORK.fullmatch(stage.kind):
        return Finding("stage folder", "warn", f"{found} is reached over the network", "give a folder on the node's own disk, such as $TMPDIR, or leave it out")
    if stage.kind in IN_MEMORY:
        return Finding("stage folder", "warn", f"{found} counts against the job's memory", "give a folder on a disk, or ask sbatch for as much more --mem")
    missing = shards.unstaged_bytes if shards else 0
    room = f"{in_words(missing)} to copy, {in_words(room_to_stage(stage))} may be used there"
    if missing > room_to_stage(stage):
        return Finding("stage folder", "warn", f"{found}: {room}; the rest is read from the dataset home", "free some space, or give another folder")
    return Finding("stage folder", "ok", f"{found}: {room}")


def logger_folder(facts: Facts) -> Finding:
    """A folder that the next job finds again."""
    runs = facts.runs
    if runs is None:
        return Finding("logger folder", "ok", "no --logger-folder to look at")
    found = f"{runs.path} on {runs.kind}"
    if not runs.writable:
        return Finding("logger folder", "fail", f"{found} cannot be written to", "give a folder of yours")
    if runs.kind in IN_MEMORY or runs.is_temporary:
        return Finding("logger folder", "warn", f"{found} is temporary: a later job does not find the run", "give a folder that all nodes see and that lasts")
    return Finding("logger folder", "ok", found)


def room_for_runs(facts: Facts) -> Finding:
    """Free space against what the runs of a whole sweep hold at their fullest: an estimate, and quotas do not show here."""
    runs, weights = facts.runs, facts.weights
    if runs is None or weights is None or weights.parameters is None:
        return Finding("room for runs", "ok", "not estimated: needs --logger-folder and a --model-name whose size is known")
    each = most_bytes(checkpoint_bytes(weights.parameters, weights.parameters), best_bytes(weights.parameters))
    missing = [max(0, each - written) for written in facts.written_bytes]
    this = missing[facts.run] if facts.run is not None else max(missing)
    found = f"about {in_words(sum(missing))} for {counted(len(missing), 'run')} (estimated, {in_words(each)} each), {in_words(runs.free_bytes)} are free"
    if runs.free_bytes < this:
        return Finding("room for runs", "fail", found, f"make room on {runs.path}, or give another --logger-folder")
    if runs.free_bytes < sum(missing):
        return Finding("room for runs", "warn", found, "make room, or run fewer at once: a finished run keeps a fifth")
    return Finding("room for runs", "ok", f"{found}; a quota would not show here")


def weights_at_hand(facts: Facts) -> Finding:
    """The start weights, on this machine where it sees no network."""
    weights = facts.weights
    if weights is None:
        return Finding("weights", "ok", "no --model-name to look for")
    if weights.state == "nowhere":
        return Finding("weights", "fail", f"--model-name {weights.name}: neither a model, nor a file or folder here, nor owner/name", "check its spelling")
    if weights.state == "hub":
        found, fix = f"{weights.name} is not in the cache", f"run python -m models fetch {weights.name} where there is a network, with the same HF_HOME"
        if facts.offline:
            return Finding("weights", "fail", f"{found}, and HF_HUB_OFFLINE forbids the network", fix)
        if facts.allocation.job:
            return Finding("weights", "warn", f"{found}, and compute nodes often see no network", fix)
        return Finding("weights", "ok", f"{found} and will be fetched")
    return Finding("weights", "ok", f"{weights.name}: " + ("starts from random numbers" if weights.state == "random" else "is here"))


def versions(facts: Facts) -> Finding:
    """What setup.cfg asks for."""
    wrong = [f"{name} {found or 'is missing'} ({wanted or 'any'})" for name, (found, wanted) in facts.versions.items() if not is_within(found, wanted)]
    if wrong:
        found = f"outside setup.cfg's ranges: {', '.join(wrong)}"
        return Finding("versions", "fail", found, "run make install, and have slurm/env.sh activate its environment")
    main = [f"{name} {facts.versions[name][0]}" for name in ("python", "torch", "transformers", "webdataset", "numpy") if name in facts.versions]
    return Finding("versions", "ok", f"{', '.join(main)}; {counted(len(facts.versions), 'version')} within setup.cfg's ranges")


def is_within(found: str | None, wanted: str) -> bool:
    """Whether a version is in a range such as `>=5.17,<6`, by the numbers of its release alone."""
    if found is None:
        return False
    for bound in filter(None, wanted.split(",")):
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([\d.]+)\s*", bound)
        if match and not OF_OPERATORS[match[1]](_release(found), _release(match[2])):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """Without zeros at its end: 5.0 is 5."""
    numbers = [int(number) for number in (re.match(r"\d+(\.\d+)*", version) or [""])[0].split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
