"""`python -m models fetch`, without a network."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import TimesformerForVideoClassification, VideoMAEForVideoClassification

from models import load_trained
from models.__main__ import main
from tests.making_models import FAMILIES, clips, normalised, plain_logits, plain_model, write_checkpoint


def no_hub(*_: Any, **__: Any) -> None:  # Any: the hub's own arguments
    raise ConnectionError("no route to host\nsecond line")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_hub)
    monkeypatch.setattr("models.__main__.show_log", lambda: None)  # it would take pytest's own handlers away


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_checkpoint_becomes_a_plain_folder_with_its_head_and_names(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = plain_model(family, id2label={k: f"class {k}" for k in range(174)})
    start = write_checkpoint(tmp_path / "start", plain, drop_path_rate=0.1)  # transformers' TimeSformer does not load such a config
    (start / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags:\n- video\n---\n# A model\n")
    with caplog.at_level(logging.INFO):
        assert main(["fetch", str(start), "--output", str(tmp_path / "plain")]) == 0
    assert "licence cc-by-nc-4.0" in caplog.text and " MB in " in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "start"]

    video, order = clips(), {"videomae": "rgb", "timesformer": "bgr"}[family]
    model, names = load_trained(tmp_path / "plain")
    assert names[3] == "class 3" and model.pixels.channel_order == order
    expected = plain_logits(plain, video, order)
    torch.testing.assert_close(model(video), expected, rtol=0, atol=1e-5)
    reader: Any = {"videomae": VideoMAEForVideoClassification, "timesformer": TimesformerForVideoClassification}[family]
    with torch.no_grad():
        again = reader.from_pretrained(tmp_path / "plain").eval()(normalised(video, model.pixels.mean, model.pixels.std, order)).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_a_hub_checkpoint_is_brought_into_the_cache_with_one_file_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path, plain_model("timesformer"))
    asked: list[list[str]] = []

    def snapshot(hub_id: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only and not asked:
            raise FileNotFoundError("not cached")
        asked.append(allow_patterns)
        return str(folder)

    siblings = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin", "optimizer.pt")]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_: SimpleNamespace(siblings=siblings))
    with caplog.at_level(logging.INFO):
        assert main(["fetch", "timesformer"]) == 0
    assert "pytorch_model.bin" in asked[0] and "model.safetensors" not in asked[0] and "optimizer.pt" not in asked[0]
    assert "licence CC-BY-NC-4.0" in caplog.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fetch", "videomae"], "error: MCG-NJU/videomae-base-finetuned-ssv2: it is not in the Hugging Face cache, and the hub cannot be reached"),
        (["fetch", "videomae-tiny"], "nothing to fetch"),
        (["fetch", "videomea"], "Did you mean videomae?"),
        (["fetch", "./nowhere"], "no such file or folder"),
        (["fetch", "."], "is already here. Give --output"),
        (["fetch", "videomae", "--output", "."], "already there"),
        (["fetsch", "videomae"], "Did you mean fetch?"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_exit_code_two(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_checkpoint_that_no_model_takes_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = write_checkpoint(tmp_path / "start", plain_model("timesformer"), model_type="vivit")
    assert main(["fetch", str(start), "--output", str(tmp_path / "plain")]) == 2
    assert "model_type 'vivit'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m models fetch NAME" in capsys.readouterr().out
