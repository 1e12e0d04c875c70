"""Shards, or the unconverted folder, to batches on the device. Adding a loader is one file and one line in LOADERS."""

from __future__ import annotations

LOADERS = {
    "webdataset": "loaders.shards:ShardSource",
    "npz": "loaders.npz:NpzSource",
    "dali": "loaders.dali:DaliSource",
}
