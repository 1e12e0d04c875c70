"""What the last full verify found, kept beside the manifest, so that `describe` can tell it without reading a clip."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from clips.files import sha256_of, write_json
from clips.manifest import MANIFEST, Manifest

logger = logging.getLogger(__name__)

VERIFIED = "verified.json"


@dataclass(frozen=True)
class Quality:
    """PSNR in dB over the clips of one split; None where every frame is bit-exact."""

    clips: int
    psnr_min_db: float | None
    psnr_mean_db: float | None


def write_verified(shards: Path, psnr_db: Mapping[str, float]) -> None:
    """`psnr_db` by key, infinite where frames are equal. A folder that cannot be written is said, and no error."""
    by_split: dict[str, list[float]] = {}
    for key, value in psnr_db.items():
        by_split.setdefault(key.split("/")[0], []).append(value)
    found = {split: asdict(quality(values)) for split, values in sorted(by_split.items())}
    try:
        write_json(shards / VERIFIED, {"manifest_sha256": sha256_of(shards / MANIFEST), "splits": found})
    except OSError as error:
        logger.info(f"{shards / VERIFIED}: not written ({error.strerror or error}); describe will not tell the PSNR")


def forget_verified(shards: Path) -> None:
    """What an earlier verify found no longer counts. A folder that cannot be written is left as it is: nothing in it changed either."""
    try:
        (shards / VERIFIED).unlink(missing_ok=True)
    except OSError as error:
        logger.info(f"{shards / VERIFIED}: not removed ({error.strerror or error})")


def read_verified(shards: Path) -> dict[str, Quality] | None:
    """The qualities by split; None where no verify against the npz has passed since the manifest was written."""
    try:
        packed = json.loads((shards / VERIFIED).read_text(encoding="utf-8"))
        if packed["manifest_sha256"] != sha256_of(shards / MANIFEST):
            return None
        return {split: Quality(**values) for split, values in packed["splits"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def quality(psnr_db: list[float]) -> Quality:
    finite = [value for value in psnr_db if value != float("inf")]
    return Quality(len(psnr_db), min(finite) if finite else None, sum(finite) / len(finite) if finite else None)


def not_packed(manifest: Manifest) -> str:
    """What of the npz the shards do not hold, to end a sentence; empty where they hold all."""
    left_out = sum(len(split.bad) for split in manifest.splits.values())
    names = [*manifest.arrays["dropped"]]
    names += [f"{manifest.arrays['keypoints']}, where there was one"] if manifest.arrays["keypoints_mode"] == "none" else []
    names += [f"{left_out} bad snippets"] if left_out else []
    return f"; not packed: {', '.join(names)}" if names else ""
