"""What tests of view share: shards to look at, and the page as Python's own parser finds it."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convert.pack import PackConfig, pack
from convert.view import ViewConfig, view
from tests.making import write_home
from tests.packing import use_threads

COUNTS = {"train": {"nongesture": 7, "gesture": 3}, "val": {"nongesture": 2, "gesture": 2}}
FRAMES, HEIGHT, WIDTH = 12, 32, 40
GESTURES = ["train/gesture/000000007_train_gesture_001", "train/gesture/000000008_train_gesture_002", "train/gesture/000000009_train_gesture_002"]
NONGESTURES = [f"train/nongesture/{number:09d}_train_nongesture_{number // 4:03d}" for number in range(7)]


def write_shards(folder: Path) -> Path:
    """A home of clips that are wider than high, some padded, as bit-exact shards, as smaller JPEGs, and without keypoints."""
    home = write_home(folder, COUNTS, FRAMES, HEIGHT, WIDTH, padded_every=3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_threads(monkeypatch)
        pack(PackConfig(home, folder / "shards", codec="zstd", shard_mib=0.2, workers=2))
        pack(PackConfig(home, folder / "small", quality=95, store_size=16, workers=2))
        pack(PackConfig(home, folder / "blind", codec="zstd", keypoints="none", splits=("val",), workers=2))
    return folder


class Page(HTMLParser):
    """What a browser finds: the text and tags of each article, the JSON blocks, and every address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.articles: list[str] = []
        self.tags: Counter[str] = Counter()
        self.blocks: list[dict[str, Any]] = []
        self.addresses: list[str] = []
        self.title = ""
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.clips = [block for block in self.blocks if "frames" in block]
        (self.known,) = (block for block in self.blocks if "height" in block)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "article":
            self.articles.append("")
        if tag not in ("meta", "input"):
            self._inside.append(tag if ("type", "application/json") not in attrs else "json")

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop().replace("json", "script") == tag

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside == "json":
            self.blocks.append(json.loads(data))
        elif inside == "title":
            self.title += data
        elif "article" in self._inside:
            self.articles[-1] += data


def shown(folder: Path, output: Path, shards: str = "shards", **flags: Any) -> Page:
    """The page that view wrote with these flags."""
    assert view(ViewConfig(folder / shards, output, **flags)) == 0
    return Page(output)


def keys(page: Page) -> list[str]:
    return [next(word for word in article.split() if word.startswith(("train/", "val/"))) for article in page.articles]


def home_of(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith("ellen"))


def jpegs(clip: dict[str, Any]) -> list[np.ndarray]:
    """uint8 (h, w, 3) of each data URI, by Pillow."""
    frames = []
    for uri in clip["frames"]:
        kind, data = uri.split(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.format == "JPEG"
            frames.append(np.asarray(image))
    return frames


def mask_of_page(points: Sequence[Sequence[int]], shape: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for t, flat in enumerate(points):
        for y, x in zip(flat[::2], flat[1::2], strict=True):
            mask[t, y, x] = 1
    return mask
