"""The geometry that a model is given: frames and pixels, in whole tubelets and patches."""

from __future__ import annotations

from dataclasses import dataclass

from clips.clip import ClipSpec
from clips.errors import InputError

from .config import ModelConfig

Grid = tuple[int, int, int]  # tokens over time, down, across


@dataclass(frozen=True)
class Patch:
    """What one token covers: frames, and pixels down and across."""

    frames: int
    height: int
    width: int

    def grid(self, spec: ClipSpec) -> Grid:
        """Tokens of a clip that divides into patches."""
        return spec.frames // self.frames, spec.height // self.height, spec.width // self.width


def resolve_geometry(config: ModelConfig, own: ClipSpec, source: ClipSpec | None, patch: Patch) -> ClipSpec:
    """What the flags ask for: the checkpoint's `own` geometry, or that of the stored clips (`source`), each part overridden by its flag."""
    frames, frames_flag = _frames(config, own, source, patch.frames)
    (height, width), size_flag = _size(config, own, source)
    if frames % patch.frames:
        near = _neighbours(frames, patch.frames)
        raise InputError(f"{frames_flag}: expected a multiple of {patch.frames}, the frames of a token; found {frames}. Give --frames {near}.")
    for pixels, side in ((height, patch.height), (width, patch.width)):
        if pixels % side:
            near = _neighbours(pixels, side)
            raise InputError(f"{size_flag}: expected a multiple of {side}, the pixels of a patch; found {height}x{width}. Give --size {near}.")
    return ClipSpec(frames, height, width)


def _frames(config: ModelConfig, own: ClipSpec, source: ClipSpec | None, tubelet: int) -> tuple[int, str]:
    """Frames, and the flag that asked for them."""
    if isinstance(config.frames, int):
        _check_stored(config.frames, own, source, tubelet)
        return config.frames, f"--frames {config.frames}"
    if config.frames == "all" or config.geometry == "full":
        flag = "--frames all" if config.frames == "all" else "--geometry full"
        return _all_frames(_stored(source, flag), tubelet), flag
    return own.frames, "--geometry native"


def _all_frames(source: ClipSpec, tubelet: int) -> int:
    """The stored frames, rounded up to whole tubelets: 40 of 39."""
    return -(-source.frames // tubelet) * tubelet


def _check_stored(frames: int, own: ClipSpec, source: ClipSpec | None, tubelet: int) -> None:
    """Raises InputError for more frames than are stored; as many as the checkpoint's own may be asked for by number, too."""
    if source is not None and frames > max(_all_frames(source, tubelet), own.frames):
        most = _all_frames(source, tubelet)
        raise InputError(f"--frames {frames}: a clip has {source.frames} stored frames, more only repeat them. Give at most {most}, as --frames all does.")


def _size(config: ModelConfig, own: ClipSpec, source: ClipSpec | None) -> tuple[tuple[int, int], str]:
    """Height and width, and the flag that asked for them."""
    if config.size is not None:
        return (config.size, config.size), f"--size {config.size}"
    if config.geometry == "full":
        stored = _stored(source, "--geometry full")
        return (stored.height, stored.width), "--geometry full"
    return (own.height, own.width), "--geometry native"


def explain_geometry(spec: ClipSpec, own: ClipSpec, source: ClipSpec | None) -> list[str]:
    """Lines for the log: what differs from the checkpoint, and frames that repeat."""
    lines = []
    if spec != own:
        lines.append(f"geometry differs from the checkpoint's {own}: its positions are interpolated, bicubic over the picture, then linear over time")
    if source is not None and spec.frames > source.frames:
        repeated = "the last is repeated" if spec.frames == source.frames + 1 else f"{spec.frames - source.frames} are repeated"
        lines.append(f"frames: {source.frames} are stored, the model takes {spec.frames}: {repeated}")
    return lines


def _stored(source: ClipSpec | None, flag: str) -> ClipSpec:
    if source is None:
        raise ValueError(f"{flag} needs the geometry of the stored clips: give build_model its source")
    return source


def _neighbours(number: int, step: int) -> str:
    """The multiples of `step` on both sides."""
    below, above = number // step * step, -(-number // step) * step
    return f"{below} or {above}" if below else str(above)
