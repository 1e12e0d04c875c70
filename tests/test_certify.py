"""python -m loaders certify: runs made by hand whose certificate is right, and ones in which one thing is not."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from clips.errors import InputError
from loaders.certificate import Certificate, clip_proof, write_certificate
from loaders.certify import CertifyConfig, certify
from loaders.plan import Plan, balanced_labels
from loaders.source import fraction, open_source
from loaders.stream import Loader
from tests import by_hand
from tests.loading import CROP, MANY_SHARDS_MIB, SEED, keys_of, npz_home, shards

REPOSITORY = Path(__file__).parent.parent
BATCH = 4
LAST = "{} epochs as planned: each clip that was trained on came in its place, and no other"
NUM_CLIPS = 21  # 12 of nongesture, 9 of gesture


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def npz(base: Path) -> Path:
    return npz_home(base)


def label_of(key: str) -> int:
    return ["nongesture", "gesture"].index(key.split("/")[1])


@dataclass
class Run:
    """A run on all of the training clips, epoch after epoch: what came at each position, and which of that was bad."""

    home: Path
    flags: dict[str, Any] = field(default_factory=dict)
    epochs: list[list[str]] = field(default_factory=list)
    under_way: list[str] | None = None
    bad: tuple[str, ...] = ()

    def planned(self, epoch: int) -> list[str]:
        keys = keys_of(self.home)
        return [keys[number] for number in by_hand.permutation(NUM_CLIPS, "order", SEED, epoch)][: NUM_CLIPS // BATCH * BATCH]

    def write(self, folder: Path, keys: Sequence[str] | None = None) -> Path:
        """The folder with config.json, for the training clips `keys`, and certificate.json."""
        lines = [f"{key}\t{label_of(key)}\n" for key in sorted(keys or keys_of(self.home))]
        data = {"train": hashlib.sha256("".join(lines).encode()).hexdigest(), "val": "-"}
        config = {"dataset_home": str(self.home), "seed": SEED, "batch_size": BATCH, "fraction": 1.0, "balance": False, "data": data, **self.flags}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        certificate = Certificate(2)
        for epoch, came in enumerate(self.epochs):
            self._train(certificate, epoch, came)
            certificate.finish([certificate.state_dict()])
        if self.under_way is not None:
            self._train(certificate, len(self.epochs), self.under_way)
        write_certificate(folder / "certificate.json", certificate.state_dict())
        return folder

    def _train(self, certificate: Certificate, epoch: int, came: Sequence[str]) -> None:
        certificate.begin(epoch)
        for position, key in enumerate(came):
            if key in self.bad:
                certificate.add(0, [], [(position, key)])
            else:
                certificate.add(clip_proof(epoch, position, key, label_of(key)), [label_of(key)])


@pytest.fixture
def run(npz: Path) -> Run:
    """Three epochs as planned."""
    made = Run(npz)
    made.epochs = [made.planned(epoch) for epoch in range(3)]
    return made


def verdicts(folder: Path, capsys: pytest.CaptureFixture[str], home: Path | None = None) -> tuple[int, list[str]]:
    code = certify(CertifyConfig(folder, home))
    return code, capsys.readouterr().out.splitlines()


def line_of(epoch: int, came: Sequence[str]) -> str:
    gestures = sum(label_of(key) for key in came)
    return f"epoch {epoch}: {len(came)} clips as planned ({len(came) - gestures} nongesture, {gestures} gesture)"


def test_a_run_as_planned_is_certified_epoch_by_epoch(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = verdicts(run.write(tmp_path / "run"), capsys)
    assert code == 0
    assert lines == [*(line_of(epoch, run.epochs[epoch]) for epoch in range(3)), LAST.format(3)]


def test_a_neighbours_key_is_found_in_its_epoch(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = keys_of(run.home)
    place = next(place for place, key in enumerate(run.epochs[1]) if label_of(key) == label_of(keys[keys.index(key) - 1]))
    run.epochs[1][place] = keys[keys.index(run.epochs[1][place]) - 1]  # of the same class: the sum alone can tell
    code, lines = verdicts(run.write(tmp_path / "run"), capsys)
    assert code == 1
    assert lines[1].startswith("epoch 1: DIFFERS from the plan: the sum of its clips is ")
    assert [lines[0], lines[2], lines[3]] == [line_of(0, run.epochs[0]), line_of(2, run.epochs[2]), "not as planned: epoch 1"]


def test_two_clips_in_each_others_place_are_found(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.epochs[2][0], run.epochs[2][5] = run.epochs[2][5], run.epochs[2][0]
    code, lines = verdicts(run.write(tmp_path / "run"), capsys)
    assert (code, lines[-1]) == (1, "not as planned: epoch 2")
    assert "were counted" not in lines[2]


def test_an_epoch_in_the_order_of_another_is_found(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.epochs[0], run.epochs[1] = run.epochs[1], run.epochs[0]
    assert verdicts(run.write(tmp_path / "run"), capsys)[1][-1] == "not as planned: epoch 0, 1"


def test_bad_clips_are_named_as_not_trained_on(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.bad = (run.epochs[1][3], run.epochs[1][7])
    code, lines = verdicts(run.write(tmp_path / "run"), capsys)
    assert code == 0
    assert lines[1].endswith(f"; not trained on, because they were bad: {run.bad[0]}, {run.bad[1]}")
    good = [key for key in run.epochs[1] if key not in run.bad]
    gestures = sum(map(label_of, good))
    assert lines[1].startswith(f"epoch 1: 20 clips as planned ({18 - gestures} nongesture, {gestures} gesture)")


def test_the_epoch_under_way_is_compared_up_to_where_it_stands(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.under_way = run.planned(3)[:8]
    code, lines = verdicts(run.write(tmp_path / "run"), capsys)
    assert code == 0
    assert lines[3] == line_of(3, run.under_way).replace("8 clips", "8 of 20 clips so far")
    run.under_way[0] = run.planned(3)[8]
    assert verdicts(run.write(tmp_path / "run"), capsys)[1][-1] == "not as planned: epoch 3"


def change(folder: Path, epoch: int, **values: object) -> None:
    """Changes fields of a record behind the certificate's back."""
    path = folder / "certificate.json"
    state = json.loads(path.read_text())
    state["epochs"][epoch].update(values)
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"clips": 16}, "16 clips were consumed; the plan has 20 in steps of 4"),
        ({"clips": 24}, "24 clips were consumed"),
        ({"class_counts": [20, 0]}, "20 nongesture, 0 gesture were counted; the plan has "),
        ({"class_counts": [1, 1, 18]}, "1 nongesture, 1 gesture, 18 of no class were counted"),
        ({"bad": [[3, "train/gesture/nobody"]]}, "bad clips that the plan has not there: train/gesture/nobody"),
        ({"bad": [[20, "train/gesture/nobody"]]}, "bad clips that the plan has not there: train/gesture/nobody"),
        ({"sum": "0" * 32}, f"the sum of its clips is {'0' * 32}; the plan's is "),
    ],
)
def test_what_else_differs_is_said(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, object], text: str) -> None:
    folder = run.write(tmp_path / "run")
    change(folder, 1, **values)
    code, lines = verdicts(folder, capsys)
    assert (code, lines[-1]) == (1, "not as planned: epoch 1")
    assert text in lines[1]


@pytest.mark.parametrize("clips", [6, 24])
def test_an_epoch_under_way_inside_a_step_or_beyond_the_plan_differs(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], clips: int) -> None:
    run.under_way = (run.planned(3) + run.planned(4))[:clips]
    code, lines = verdicts(run.write(tmp_path / "run"), capsys)
    assert (code, lines[3]) == (1, f"epoch 3: DIFFERS from the plan: {clips} clips were consumed; the plan has 20 in steps of 4")


def test_a_clip_that_came_and_is_called_bad_too_differs(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.write(tmp_path / "run")
    change(folder, 0, bad=[[3, run.epochs[0][3]]])
    assert verdicts(folder, capsys)[0] == 1
    change(folder, 0, bad=[[3, run.epochs[0][3]], [3, run.epochs[0][3]]])
    assert "one place twice" in verdicts(folder, capsys)[1][0]


def test_an_epoch_without_a_record_differs(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.write(tmp_path / "run")
    path = folder / "certificate.json"
    state = json.loads(path.read_text())
    del state["epochs"][1]
    path.write_text(json.dumps(state))
    code, lines = verdicts(folder, capsys)
    assert code == 1
    assert lines == ["epoch 1: missing", line_of(0, run.epochs[0]), line_of(2, run.epochs[2]), "not as planned: epoch 1"]


def test_data_that_moved_or_were_packed_since_certify_the_same(run: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.flags = {"dataset_home": str(tmp_path / "moved away")}
    folder = run.write(tmp_path / "run")
    for home in (run.home, shards(base, "zstd", MANY_SHARDS_MIB)):
        assert verdicts(folder, capsys, home)[0] == 0
    with pytest.raises(InputError, match=r"--dataset-home .*moved away"):
        certify(CertifyConfig(folder))


def train_by_loader(home: Path, share: float, epoch: int) -> tuple[list[str], dict[str, Any]]:
    """The keys of a balanced fraction, and what two ranks certify of an epoch of it: clips as the loader read them."""
    ranks = [Certificate(2, rank) for rank in range(2)]
    for rank, certificate in enumerate(ranks):
        source = open_source(home, "train")
        subset = fraction(source.facts, share)
        labels = balanced_labels([source.facts[number] for number in subset], source.class_names)
        plan = Plan(len(subset), BATCH, 1, SEED, rank, 2, labels)
        loader = Loader(source, plan, CROP, torch.device("cpu"), 1, subset=subset)
        certificate.begin(epoch)
        for batch in loader.training(epoch):
            certificate.add(batch.proof, batch.labels, [(one.position, one.key) for one in batch.bad])
        loader.close()
    states = [certificate.state_dict() for certificate in ranks]
    for certificate in ranks:
        certificate.finish(states)
    return [source.facts[number].key for number in subset], ranks[1].state_dict()


def test_what_two_ranks_read_of_a_balanced_fraction_is_certified(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, state = train_by_loader(run.home, 0.6, 0)  # 8 and 6 clips
    run.flags = {"fraction": 0.6, "balance": True}
    folder = run.write(tmp_path / "run", keys)
    write_certificate(folder / "certificate.json", state)
    assert verdicts(folder, capsys) == (0, ["epoch 0: 12 clips as planned (6 nongesture, 6 gesture)", LAST.format(1).replace("epochs", "epoch")])
    for flags in ({"fraction": 0.6}, {"fraction": 0.6, "balance": True, "seed": SEED + 1}, {"fraction": 0.6, "balance": True, "batch_size": 5}):
        run.flags = flags
        folder = run.write(tmp_path / "run", keys)
        write_certificate(folder / "certificate.json", state)
        assert verdicts(folder, capsys)[0] == 1
    run.flags = {"fraction": 0.5, "balance": True}
    with pytest.raises(InputError, match="holds other training clips"):
        certify(CertifyConfig(run.write(tmp_path / "run", keys)))


def test_another_data_set_is_an_error_that_names_both(run: Run, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "run", keys_of(run.home)[1:])
    with pytest.raises(InputError, match=r"--dataset-home .*: holds other training clips than the run .*/run had: .* config\.json names"):
        certify(CertifyConfig(folder))


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("certificate.json", None, r"certificate\.json: missing"),
        ("config.json", None, r"config\.json: missing; expected the folder of a run"),
        ("config.json", "{", r"config\.json: not the configuration of a run"),
        ("config.json", "[]", r"config\.json: not the configuration of a run"),
        ("config.json", "{}", r"config\.json: not the configuration of a run"),
        ("config.json", '{"dataset_home": 1, "fraction": 1, "batch_size": "4", "seed": 0, "data": {"train": ""}}', "look at dataset_home, batch_size"),
        ("config.json", '{"dataset_home": "d", "fraction": 1, "batch_size": 4, "seed": 0, "data": {"train": 1}}', "look at data"),
    ],
)
def test_a_folder_that_is_no_run_is_an_error_that_names_the_file(run: Run, tmp_path: Path, file: str, content: str | None, text: str) -> None:
    folder = run.write(tmp_path / "run")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=text):
        certify(CertifyConfig(folder))


def command(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "loaders", "certify", str(folder)], cwd=REPOSITORY, capture_output=True, text=True)


def test_the_exit_code_is_0_or_1_by_the_verdict_and_2_where_there_is_none(run: Run, tmp_path: Path) -> None:
    good = command(run.write(tmp_path / "run"))
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[-1] == LAST.format(3)
    run.epochs[2].reverse()
    bad = command(run.write(tmp_path / "run"))
    assert (bad.returncode, bad.stdout.splitlines()[-1], bad.stderr) == (1, "not as planned: epoch 2", "")
    none = command(tmp_path)
    assert (none.returncode, none.stdout, none.stderr.count("\n")) == (2, "", 1)
    assert none.stderr.startswith(f"error: {tmp_path / 'certificate.json'}: missing")


def test_certifying_needs_no_torch(run: Run, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "run")
    program = (
        "import sys; from pathlib import Path; from loaders.certify import CertifyConfig, certify; "
        f"certify(CertifyConfig(Path({str(folder)!r}))); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.DEVNULL).returncode == 0
