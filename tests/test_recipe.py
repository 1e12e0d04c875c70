"""Recipes as the command line takes them: plain is the flags' own defaults, the user's flags win, and what departs is said."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from clips import command
from clips.errors import InputError
from clips.registry import check_name
from loaders.sample import AugmentConfig
from models.config import ModelConfig
from training.mixing import MixConfig
from training.optimizer import OptimizerConfig
from training.recipe import PLAIN, RECIPES, Recipe, RecipeConfig, choose, departures, used, words
from training.schedule import ScheduleConfig


@dataclass(frozen=True)
class Flags:
    """As train.py joins them."""

    model: ModelConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


def parsed(*typed: str) -> dict[str, Any]:
    flags: dict[str, Any] = command.flatten(command.parse(Flags, "train.py", "", ["--model-name", "m", *typed]))
    return flags


def test_plain_is_what_the_flags_are_without_a_recipe() -> None:
    assert used(parsed()) == PLAIN == RECIPES["plain"]
    assert departures(used(parsed())) == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_words_of_a_recipe_set_every_one_of_its_values_and_nothing_else(name: str) -> None:
    found, before = parsed(*words(name)), parsed()
    assert used(found) == RECIPES[name] and found["recipe"] == name
    others = set(before) - {one.name for one in fields(Recipe)} - {"recipe"}
    assert {flag: found[flag] for flag in others} == {flag: before[flag] for flag in others}


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        (("--lr", "1e-3"), "lr", 1e-3),
        (("--lr-milestones", "10", "20", "30"), "lr_milestones", (10, 20, 30)),
        (("--mixup", "0"), "mixup", 0.0),
        (("--no-head-prior",), "head_prior", False),
        (("--hflip", "0.25"), "hflip", 0.25),
        (("--layer_decay", "0.9"), "layer_decay", 0.9),
        (("--crop-scale", "0.3", "0.9"), "crop_scale", (0.3, 0.9)),
        (("--optimizer", "sgd"), "optimizer", "sgd"),
    ],
)
def test_the_users_flags_win_over_the_recipes(typed: tuple[str, ...], name: str, value: Any) -> None:
    recipe = RECIPES["videomae-ssv2"]
    assert used(parsed(*words("videomae-ssv2"), *typed)) == replace(recipe, **{name: value})


def test_the_videomae_recipe_is_told_from_plain_line_by_line() -> None:
    assert departures(RECIPES["videomae-ssv2"]) == [
        "layer decay 0.75 (plain: none)",
        "drop path 0.1 (plain: none)",
        "head prior on (plain: off)",
        "strength 7 (plain: none)",
        "erasing 0.25 (plain: none)",
        "repeats 2 (plain: none)",
        "mixup 0.8 (plain: none)",
        "cutmix 1 (plain: none)",
        "smoothing 0.1 (plain: none)",
    ]


def test_departures_of_the_user_are_told_too() -> None:
    found = used(parsed("--lr-milestones", "--hflip", "0", "--optimizer", "sgd", "--clip-grad", "0", "--crop-scale", "0.08", "1"))
    assert departures(found) == [
        "optimizer sgd (plain: adamw)",
        "clip grad none (plain: 1)",
        "lr milestones none (plain: 35 80)",
        "crop scale 0.08 1 (plain: 0.5 1)",
        "hflip none (plain: by the classes)",
    ]


def test_values_read_back_from_json_do_not_depart() -> None:
    flags = parsed()
    assert departures(used({name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()})) == []


def test_no_recipe_cuts_smaller_crops_or_changes_the_schedule() -> None:
    """Crops down to .08 would cut off the joints; the rate falls with the run's length, which is the user's."""
    for recipe in RECIPES.values():
        assert recipe.crop_scale == (0.5, 1.0) and recipe.hflip is None
        assert (recipe.sched, recipe.lr_milestones, recipe.lr_gamma) == ("multistep", (35, 80), 0.2)


@pytest.mark.parametrize(
    ("asked", "model_name", "expected"),
    [
        (None, "videomae", "videomae-ssv2"),
        (None, "MCG-NJU/videomae-small-finetuned-ssv2", "videomae-ssv2"),
        (None, "timesformer", "timesformer-ssv2"),
        (None, "facebook/timesformer-hr-finetuned-ssv2/", "timesformer-ssv2"),
        (None, "videomae-tiny", "plain"),
        (None, "timesformer-tiny", "plain"),
        (None, "/runs/seven/best", "plain"),
        (None, None, "plain"),
        ("plain", "videomae", "plain"),
        ("timesformer-ssv2", "videomae", "timesformer-ssv2"),
    ],
)
def test_the_recipe_is_the_models_unless_one_is_asked_for(asked: str | None, model_name: str | None, expected: str) -> None:
    assert choose(asked, model_name) == expected
    check_name(RECIPES, expected, "--recipe")


def test_a_recipe_that_is_not_there_offers_the_nearest() -> None:
    for wrong in (lambda: choose("videomae-ssv3", "videomae"), lambda: RecipeConfig(recipe="videomae-ssv3")):
        with pytest.raises(InputError, match=r"--recipe.*Did you mean videomae-ssv2"):
            wrong()


@pytest.mark.parametrize(
    ("flag", "changes"),
    [("--repeats", {"repeats": 0}), ("--repeats", {"repeats": 17}), ("--ema", {"ema": 1.0}), ("--ema", {"ema": -0.1}), ("--patience", {"patience": 0})],
)
def test_a_wrong_value_names_its_flag(flag: str, changes: dict) -> None:
    with pytest.raises(InputError, match=rf"^{flag} "):
        RecipeConfig(**changes)
