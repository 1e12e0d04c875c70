"""Groups of runs against numbers worked out by hand, and what is told of each."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clips import command
from clips.errors import InputError
from training import __main__, compare
from training.compare import CompareConfig, Group, common_folder, groups_of, mean_std, ranked, read_run, spelled, table
from training.curves import draw_curves
from training.run_folder import FREE

CONFIG: dict[str, Any] = {
    **{"epochs": 3, "lr": 0.001, "model_name": "videomae", "seed": 0, "best_metric": "auroc", "threads": 4, "dataset_home": "shards"},
    **{"data": {"train": "abcdefghijk", "val": "0123"}, "class_names": ["nongesture", "gesture"]},
}


def write_run(folder: Path, val: list[float | None], test: float | None = None, done: bool = True, **config: Any) -> Path:
    """A run with these AUROCs on val, epoch by epoch; its losses and F1 go the other way round."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    lines: list[dict[str, Any]] = []
    for epoch, auroc in enumerate(val, 1):
        lines.append({"step": 10 * epoch, "epoch": epoch, "epoch/loss": 1 / epoch})
        lines.append({"step": 10 * epoch, "epoch": epoch, "val/auroc": auroc, "val/loss": auroc, "val/f1": None if auroc is None else 1 - auroc})
    if test is not None:
        lines.append({"step": 10 * len(val), "epoch": len(val), "test/auroc": test, "test/f1": test / 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "done").touch()
    return folder


def groups(*folders: Path, metric: str = "auroc") -> list[Group]:
    return ranked(groups_of([read_run(folder) for folder in folders]), metric)


def typed(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["training", *map(str, words)])
    return command.run(__main__.main)


@pytest.fixture
def six(tmp_path: Path) -> list[Path]:
    """Two groups of three seeds; the second is better on val and the first on test."""
    one = [write_run(tmp_path / f"a{seed}", [0.5, 0.7 + 0.01 * seed, 0.6], test=0.99, seed=seed, threads=seed + 1) for seed in range(3)]
    return one + [write_run(tmp_path / f"b{seed}", [0.5, 0.6, 0.8 + 0.02 * seed], test=0.7 + 0.1 * seed, seed=seed, lr=0.01) for seed in range(3)]


def test_runs_that_differ_in_seed_and_free_flags_are_one_group_with_mean_and_deviation(six: list[Path]) -> None:
    best, other = groups(*six)
    assert [len(group.runs) for group in (best, other)] == [3, 3]
    assert (best.settings, other.settings) == ("--lr 0.01", "--lr 0.001")
    assert best.values("auroc") == pytest.approx([0.8, 0.82, 0.84]) and other.values("auroc") == pytest.approx([0.7, 0.71, 0.72])
    assert spelled(best.values("auroc")) == "0.8200 ± 0.0200"  # sample deviation of .80 .82 .84
    assert mean_std([0.25]) == (0.25, None) and mean_std([]) == (None, None) and spelled([0.25]) == "0.2500"


def test_val_alone_ranks_and_test_is_told_of_the_best_group_only(six: list[Path]) -> None:
    text = table(groups(*six), "auroc")
    assert text.splitlines() == [
        f"val auroc at each run's best epoch, mean ± standard deviation over the runs of a row; folders in {six[0].parent}",
        "    val auroc        runs  best epochs  folders     settings",
        "1.  0.8200 ± 0.0200  3     3, 3, 3      b0, b1, b2  --lr 0.01",
        "2.  0.7100 ± 0.0100  3     2, 2, 2      a0, a1, a2  --lr 0.001",
        "test of 1., 3 runs:",
        "    f1     0.4000 ± 0.0500",
        "    auroc  0.8000 ± 0.1000",
    ]
    assert "0.99" not in text


def test_groups_of_one_value_are_told_to_tie(tmp_path: Path) -> None:
    equal = [write_run(tmp_path / f"equal{lr}", [0.7], test=0.5, lr=lr) for lr in (0.1, 0.2)]
    near = write_run(tmp_path / "near", [0.70001], test=0.6, lr=0.3)
    assert "1. and 2. tie: val auroc is equal; the test is that of the one given first" in table(groups(*equal), "auroc").splitlines()
    text = table(groups(*equal, near), "auroc")
    assert "1. and 2. tie: val auroc is equal to 4 digits\n2. and 3. tie: val auroc is equal\n" in text and "0.6000" in text
    other = write_run(tmp_path / "other", [0.6], lr=0.5)
    unfinished = write_run(tmp_path / "unfinished", [0.6], lr=0.4, done=False)
    assert "tie" not in table(groups(equal[0], other, unfinished), "auroc")


def test_folders_are_named_from_where_they_part_and_only_the_first_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        write_run(Path("lr") / f"s{number}", [0.5], seed=number)
    runs = [Path("lr") / f"s{number}" for number in range(10)]
    text = table(groups(*runs), "auroc")
    assert "; folders in lr\n" in text and "s0, s1, s2, s3, s4, s5, s6, s7 and 2 more  the same" in text
    assert "lr/s0, alone  the same" in table(groups(runs[0], write_run(Path("alone"), [0.5])), "auroc")
    assert common_folder([Path("lr/s0"), tmp_path]) is None and common_folder([tmp_path / "a" / "b", tmp_path / "c"]) == tmp_path


def test_one_run_is_a_run_and_tests_that_some_runs_lack_are_told(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", [0.5], test=0.25), write_run(tmp_path / "other", [0.5], seed=1)
    assert "test of 1., 1 run:\n    f1     0.1250\n    auroc  0.2500" in table(groups(one), "auroc")
    assert "test of 1., 1 of its 2 runs:" in table(groups(one, other), "auroc")


def test_the_value_is_taken_at_the_epoch_that_the_run_chose(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.5, 0.7, 0.7, 0.6])
    assert groups(run)[0].values("auroc") == [0.7] and read_run(run).best == {"step": 20, "epoch": 2, "val/auroc": 0.7, "val/loss": 0.7, "val/f1": 1 - 0.7}
    assert groups(run, metric="f1")[0].values("f1") == [1 - 0.7]  # at that epoch, though epoch 1 has a higher one
    by_loss = write_run(tmp_path / "by_loss", [0.5, 0.7, 0.4, 0.4], best_metric="loss")
    assert read_run(by_loss).best["epoch"] == 3  # type: ignore[index]  # there is one


def test_less_loss_is_better(tmp_path: Path) -> None:
    low, high = write_run(tmp_path / "low", [0.2], best_metric="loss"), write_run(tmp_path / "high", [0.4], best_metric="loss", lr=1.0)
    assert [group.runs[0].folder for group in groups(high, low, metric="loss")] == [low, high]


def test_an_undefined_metric_leaves_the_last_epoch_and_no_value(tmp_path: Path) -> None:
    undefined, other = write_run(tmp_path / "undefined", [None, None], test=0.3), write_run(tmp_path / "other", [0.1], lr=1.0)
    assert read_run(undefined).best["epoch"] == 2  # type: ignore[index]  # there is one
    found = groups(undefined, other)
    assert [group.runs[0].folder for group in found] == [other, undefined]
    assert "no test shown: without val there is no best group" in table(groups(undefined), "auroc")


def test_unfinished_runs_are_marked_and_left_out_of_the_mean_of_finished_ones(tmp_path: Path) -> None:
    finished = write_run(tmp_path / "finished", [0.5, 0.6, 0.7], test=0.5)
    running = write_run(tmp_path / "running", [0.9], done=False, seed=1)
    stopped = write_run(tmp_path / "stopped", [0.95, 0.96], done=False, seed=2, lr=0.5)
    (stopped / "stopped.json").write_text('{"reason": "interrupted"}')
    best, other = groups(stopped, running, finished)
    assert best.values("auroc") == [0.7] and other.values("auroc") == [0.96]
    assert list(best.notes()) == [f"{running} is not finished (epoch 1 of 3), left out of the mean"]
    assert list(other.notes()) == [f"{stopped} is not finished (epoch 2 of 3, stopped: interrupted)"]
    text = table([best, other], "auroc")
    assert "2.  0.9600     1 unfinished" in text and f"note on 1.: {running} is not finished" in text


def test_an_unfinished_run_has_no_test_whatever_its_lines_say(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.5], test=0.5, done=False)
    assert "test of 1.: none yet" in table(groups(run), "auroc")


def test_repeated_seeds_and_several_homes_in_a_group_are_told(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", [0.5]), write_run(tmp_path / "other", [0.5], dataset_home="shards-q75")
    (group,) = groups(one, other)
    assert list(group.notes()) == ["of the same seed (0) there is more than one run", "same clips from 2 homes, maybe of another quality: shards, shards-q75"]
    assert group.settings == "the same"


def test_other_clips_and_other_flags_are_other_groups_and_named(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", [0.5])
    data = write_run(tmp_path / "data", [0.6], data={"train": "zyxwvutsrqp", "val": "0123"})
    newer = write_run(tmp_path / "newer", [0.7], ema=0.999)
    on, off = write_run(tmp_path / "on", [0.5], balance=True), write_run(tmp_path / "off", [0.4], balance=False, lr_milestones=[3, 8])
    assert [group.settings for group in groups(on, off)] == ["--balance, --lr-milestones not set", "--no-balance, --lr-milestones 3 8"]
    found = groups(plain, data, newer)
    assert [group.settings for group in found] == [
        "data.train abcdefgh, --ema 0.999",
        "data.train zyxwvuts, --ema not set",
        "data.train abcdefgh, --ema not set",
    ]


def test_all_that_a_resumed_run_may_change_is_free() -> None:
    assert {"seed", *FREE} <= set(compare.IN_A_GROUP)
    assert {"lr", "batch_size", "model_name", "epochs", "patience", "fraction", "best_metric"} & set(compare.IN_A_GROUP) == set()


def test_folders_that_are_no_runs_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.5])
    (run / "best").mkdir()
    (run / "best" / "config.json").write_text('{"model_type": "videomae"}')
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "none", "none: expected the folder of a run, with config.json; found no such folder."),
        (tmp_path / "empty", "empty: expected the folder of a run, with config.json; found none in it."),
        (run / "best", "names no epochs. Give the folder above it."),
    ):
        with pytest.raises(InputError) as caught:
            read_run(folder)
        assert message in str(caught.value)


def test_runs_that_chose_their_best_by_different_metrics_need_one_to_rank_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    runs = write_run(tmp_path / "one", [0.5]), write_run(tmp_path / "other", [0.6], best_metric="f1")
    assert typed(monkeypatch, "compare", *runs) == 2
    assert "auroc, f1. Say with --metric" in capsys.readouterr().err
    assert typed(monkeypatch, "compare", *runs, "--metric", "f1") == 0
    assert "val f1" in capsys.readouterr().out


def test_json_holds_the_groups_and_test_of_the_best_only(six: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert typed(monkeypatch, "compare", *six, "--json", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    best, other = found["groups"]
    assert found["metric"] == "val/auroc" and (best["rank"], best["n"], best["settings"]) == (1, 3, "--lr 0.01")
    assert best["mean"] == pytest.approx(0.82) and best["std"] == pytest.approx(statistics.stdev([0.8, 0.82, 0.84]))
    assert best["test"]["auroc"] == {"mean": pytest.approx(0.8), "std": pytest.approx(0.1)} and "test" not in other
    assert [run["folder"] for run in other["runs"]] == [str(folder) for folder in six[:3]] and other["runs"][0]["val"]["epoch"] == 2
    assert "0.8200 ± 0.0200" in capsys.readouterr().out


def test_the_plot_is_a_png_that_every_run_changes(six: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert typed(monkeypatch, "compare", *six, "--plot", tmp_path / "all.png") == 0
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 1000
    whole = (tmp_path / "all.png").read_bytes()
    draw_curves(tmp_path / "again.png", groups(*six), "auroc")
    assert (tmp_path / "again.png").read_bytes() == whole
    draw_curves(tmp_path / "fewer.png", groups(*six[:5]), "auroc")
    assert (tmp_path / "fewer.png").read_bytes() != whole


def test_runs_without_val_and_without_a_line_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = write_run(tmp_path / "run", [], done=False)
    (run / "metrics.jsonl").unlink()
    assert typed(monkeypatch, "compare", run, "--plot", tmp_path / "plot.png") == 0
    assert "1 unfinished" in capsys.readouterr().out and (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(("words", "message"), [([], "no run given"), (["x", "--plot", "nowhere/x.png"], "--plot nowhere/x.png: expected a file in a folder")])
def test_wrong_words_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], message: str) -> None:
    assert typed(monkeypatch, "compare", *words) == 2
    assert message in capsys.readouterr().err


def test_the_config_names_its_flags_in_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--json "):
        CompareConfig((tmp_path,), json=tmp_path)


def test_folds_of_one_cross_validation_are_one_group_and_other_counts_another(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"fold{n}", [0.5 + n / 10], fold=f"{n}/3", data={"train": f"t{n}", "val": f"v{n}", "test": "x"}) for n in (1, 2, 3)]
    other = write_run(tmp_path / "two", [0.9], fold="1/2", data={"train": "t", "val": "v", "test": "x"})
    found = groups(*runs, other)
    assert sorted(len(group.runs) for group in found) == [1, 3]
    assert not [note for group in found for note in group.notes() if "same seed" in note]
