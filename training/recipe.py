"""The numbers that a checkpoint's authors fine-tuned with, as values for our flags, and where each number comes from.

--recipe, or the model's -> its flags, put before the user's, so that the user's win -> what departs from plain, in words

VideoMAE is MCG-NJU/VideoMAE, scripts/ssv2/videomae_vit_base_patch16_224_tubemasking_ratio_0.9_epoch_2400/finetune.sh and the defaults of
run_class_finetuning.py that it leaves alone; TimeSformer is facebookresearch/TimeSformer, configs/SSv2/TimeSformer_divST_8_224.yaml.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from clips.errors import InputError
from clips.registry import check_name

MAX_REPEATS = 16


@dataclass(frozen=True)
class Recipe:
    """A value for each flag that a recipe may set, named as the flag; the defaults are plain's, which are the flags' own."""

    # AdamW
    optimizer: str = "adamw"
    lr: float = 5e-4  # for 256 clips, as VideoMAE states it
    weight_decay: float = 0.05  # VideoMAE
    betas: tuple[float, float] = (0.9, 0.999)  # VideoMAE
    clip_grad: float = 1.0  # neither clips; one norm of 1 keeps a first step on few clips harmless
    layer_decay: float = 1.0
    # The rate over time. It belongs to the length of a run, which is the user's, so no recipe changes it: VideoMAE's is --sched cosine.
    sched: str = "multistep"
    lr_milestones: tuple[int, ...] = (35, 80)
    lr_gamma: float = 0.2
    warmup: float = 0.05  # of 100 epochs 5, which are VideoMAE's of 30
    min_lr: float = 1e-6  # VideoMAE
    # The model
    drop_path: float = 0.0
    head_init_scale: float = 0.001  # VideoMAE's init_scale
    head_prior: bool = False
    # Each clip. Both authors flip never, since Something-Something knows left from right; our classes do where they say so.
    crop_scale: tuple[float, float] = (0.5, 1.0)  # VideoMAE .08 to 1: a third of those crops lose over half of the joints, of ours 3 %
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # VideoMAE
    hflip: float | None = None
    colour: float = 0.0
    strength: float = 0.0
    erasing: float = 0.0
    repeats: int = 1
    # Each batch
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    # All steps
    ema: float = 0.0  # neither takes it


PLAIN = Recipe()
RECIPES: dict[str, Recipe] = {
    "plain": PLAIN,
    "videomae-ssv2": Recipe(
        layer_decay=0.75,  # VideoMAE
        drop_path=0.1,  # VideoMAE
        head_prior=True,  # ours: neither has classes of very different sizes
        strength=7,  # VideoMAE: rand-m7-n4-mstd0.5-inc1; ours are two changes of colour alone, its shifts and scales are the crop's
        colour=0.0,  # VideoMAE asks for .4, which timm leaves out beside RandAugment
        erasing=0.25,  # VideoMAE; its boxes are filled with noise, ours with one colour
        repeats=2,  # VideoMAE's num_sample
        mixup=0.8,  # VideoMAE
        cutmix=1.0,  # VideoMAE; joints are cut alike
        smoothing=0.1,  # VideoMAE
    ),
    "timesformer-ssv2": Recipe(
        # TimeSformer takes SGD with a rate of .005 for 8 clips and a decay of 1e-4, for want of time as its author says, who expects much of Adam
        # (its issue 55). So AdamW, as plain; --optimizer sgd --lr 0.16 --weight-decay 1e-4 is theirs.
        # No layer decay, no mixing, no smoothing, no change of colours: TimeSformer.
        drop_path=0.1,  # TimeSformer, in the model's code
        head_prior=True,  # ours, as above
    ),
}
OFF: dict[str, Any] = {"layer_decay": 1.0, "repeats": 1, "clip_grad": 0.0}  # values that mean none; of every other number 0 does


@dataclass(frozen=True)
class RecipeConfig:
    """How training goes, beyond single clips and batches."""

    recipe: str | None = None
    """videomae-ssv2, timesformer-ssv2 or plain: values for other flags, which win where they are given too; default: the model's, of tiny models plain."""
    repeats: int = 1
    """Times that a step holds each of its clips, with another crop and other colours each time; --batch-size counts all of them, --lr only different clips."""
    head_prior: bool = False
    """Start the head's bias at the log of each class's share of the training clips, so that the first steps need not learn it."""
    ema: float = 0.0
    """Evaluate and keep an average of the weights that decays by this factor a step, such as 0.999; 0 is off."""
    patience: int | None = None
    """Stop after this many epochs without a better --best-metric; default: never."""

    def __post_init__(self) -> None:
        if self.recipe is not None:
            check_name(RECIPES, self.recipe, "--recipe")
        if not 1 <= self.repeats <= MAX_REPEATS:
            raise InputError(f"--repeats {self.repeats}: expected 1 to {MAX_REPEATS}.")
        if not 0 <= self.ema < 1:
            raise InputError(f"--ema {self.ema}: expected 0 (off) or a factor below 1, such as 0.999.")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"--patience {self.patience}: expected at least 1 epoch.")


def with_recipe(args: Sequence[str], always: bool) -> list[str]:
    """A command line with its recipe's words put before it: that of --recipe, or where `always` its model's."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--recipe")
    asked.add_argument("--model-name", "--model_name")
    known = asked.parse_known_args(args)[0]
    return [*words(choose(known.recipe, known.model_name)), *args] if known.recipe or always else [*args]


def choose(recipe: str | None, model_name: str | None) -> str:
    """The recipe's name: as asked, or the model's by its own name."""
    if recipe is not None:
        check_name(RECIPES, recipe, "--recipe")
        return recipe
    name = (model_name or "").lower().rstrip("/")
    if name.endswith("-tiny"):
        return "plain"
    return next((f"{family}-ssv2" for family in ("videomae", "timesformer") if family in name), "plain")


def words(name: str) -> list[str]:
    """The recipe as the words of a command line: before the user's own, of which the last of a flag counts."""
    recipe = RECIPES[name]
    found = ["--recipe", name]
    for field in fields(Recipe):
        value = getattr(recipe, field.name)
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def used(flags: Mapping[str, Any]) -> Recipe:  # Any: the flags' values
    """What a configuration comes to, the user's flags included, from its flags by name."""
    return Recipe(**{field.name: flags[field.name] for field in fields(Recipe)})


def departures(recipe: Recipe) -> list[str]:
    """A line for every value that is not plain's, such as "layer decay 0.75 (plain: none)"."""
    lines = []
    for field in fields(Recipe):
        value, plain = getattr(recipe, field.name), getattr(PLAIN, field.name)
        if (tuple(value) if isinstance(value, list) else value) != plain:
            lines.append(f"{field.name.replace('_', ' ')} {_shown(field.name, value)} (plain: {_shown(field.name, plain)})")
    return lines


def _shown(name: str, value: Any) -> str:  # Any: as above
    if isinstance(value, (tuple, list)):
        return " ".join(f"{item:g}" for item in value) or "none"
    if value is None:
        return "by the classes"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return value
    return "none" if value == OFF.get(name, 0) else f"{value:g}"
