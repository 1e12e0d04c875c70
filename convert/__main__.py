"""python -m convert synthesize|pack|merge|verify|unpack|view|describe: npz snippets to shards, and back."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from clips import command
from clips.clip import ClipSpec
from clips.synthetic import write_snippets

from .describe import DescribeConfig, describe
from .merge import MergeConfig, merge
from .pack import PackConfig, pack
from .unpack import UnpackConfig, unpack
from .verify import VerifyConfig, verify
from .view import ViewConfig, view


@dataclass(frozen=True)
class SynthesizeConfig:
    """Makes snippets in the users' layout whose classes differ in motion alone, for demos and tests."""

    output: Path
    """The folder to make the home in."""
    clips: int = 200
    """Snippets over all splits."""
    frames: int = 39
    """Frames of a snippet."""
    size: int = 320
    """Height and width in pixels."""
    classes: tuple[str, ...] = ("nongesture", "gesture")
    """Class names in label order."""
    seed: int = 0
    """Same seed, same bytes."""


def main() -> int:
    """The exit code of the verb."""
    command.show_log()
    verbs = {
        "synthesize": SynthesizeConfig,
        "pack": PackConfig,
        "merge": MergeConfig,
        "verify": VerifyConfig,
        "unpack": UnpackConfig,
        "view": ViewConfig,
        "describe": DescribeConfig,
    }
    config = command.parse_verb(verbs, "python -m convert", "npz snippets to sharded tar archives")
    if isinstance(config, PackConfig):
        pack(config)
        if config.verify:
            return verify(VerifyConfig(config.output, config.dataset_home, config.workers))
    elif isinstance(config, MergeConfig):
        merge(config)
    elif isinstance(config, VerifyConfig):
        return verify(config)
    elif isinstance(config, UnpackConfig):
        return unpack(config)
    elif isinstance(config, ViewConfig):
        return view(config)
    elif isinstance(config, DescribeConfig):
        return describe(config)
    elif isinstance(config, SynthesizeConfig):
        spec = ClipSpec(config.frames, config.size, config.size)
        print(write_snippets(config.output, config.clips, spec, config.classes, config.seed))
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
