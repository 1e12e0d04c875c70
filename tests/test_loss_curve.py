"""Training against a plain transformers loop on the same clips: the same losses, gradient norms and weights in fp32.

The other loop knows nothing of ours: npz by numpy in the order that `python -m loaders order` prints, normalised floats, transformers' own model,
torch's AdamW and schedulers. The clips have as many frames and pixels as the models take, and training crops and flips nothing, so no pixel is chance's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import train
from clips import command
from convert.pack import PackConfig, pack
from loaders.order import OrderConfig, order_lines
from models import ModelConfig, build_model
from tests.making import HOME
from tests.making_models import CLASSES, FAMILIES, NUM_FRAMES, PROCESSOR, SMALL, normalised, plain_model
from tests.packing import source_of

TOLERANCE = 1e-4
COUNTS = {"nongesture": 10, "gesture": 8}
BATCH_SIZE, STEPS_PER_EPOCH, EPOCHS, SEED = 4, 4, 3, 5  # two of the 18 clips are left out of each epoch
# A rate, decay and head large enough that each of them shows in twelve steps: the rate falls after the second epoch, and gradients are longer than 1.
LR, GAMMA, FALLS_AFTER, WARMUP_STEPS = 2e-3, 0.2, 2, 3
WEIGHT_DECAY, CLIP_GRAD, HEAD_SCALE = 0.5, 1.0, 10.0
PLAIN = ("--recipe", "plain", "--crop-scale", "1", "1", "--crop-ratio", "1", "1", "--hflip", "0", "--precision", "fp32", "--device", "cpu")
CLASS_OF = {"videomae": "VideoMAEForVideoClassification", "timesformer": "TimesformerForVideoClassification"}
ORDER_OF = {"videomae": "rgb", "timesformer": "bgr"}  # a TimeSformer of 174 classes learned Something-Something from BGR
TABLES = ("cls_token", "position_embeddings", "time_embeddings")


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm of each step, and the weights at the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 snippets of noise, darker and lighter, of a model's own size."""
    folder, chance, size = tmp_path_factory.mktemp("npz") / HOME, np.random.RandomState(0), SMALL["image_size"]
    for class_name, count in COUNTS.items():
        (folder / "train" / class_name).mkdir(parents=True)
        for number in range(count):
            video = chance.randint(0, chance.randint(64, 257, 3), (NUM_FRAMES, size, size, 3)).astype(np.uint8)
            mask = (chance.rand(NUM_FRAMES, size, size) < 0.01).astype(np.uint8)
            np.savez_compressed(folder / "train" / class_name / f"{number:09d}_{class_name}.npz", video=video, keypoints=mask)
    return folder


@pytest.fixture(scope="module")
def shards(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "zstd"
    pack(PackConfig(home, output, codec="zstd", workers=1, shard_mib=0.05))
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_curve_equals_that_of_a_plain_transformers_loop(
    family: str, home: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    plain_model(family).save_pretrained(checkpoint)
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    head = build_model(ModelConfig(str(checkpoint), head_init_scale=HEAD_SCALE), CLASSES).classifier
    plain = plain_curve(family, checkpoint, head, home)
    ours = our_curve(family, checkpoint, shards, tmp_path / "run", monkeypatch)
    assert len(ours.losses) == STEPS_PER_EPOCH * EPOCHS
    assert ours.losses == pytest.approx(plain.losses, abs=TOLERANCE)
    assert ours.norms == pytest.approx(plain.norms, rel=1e-3)
    assert min(plain.norms) > CLIP_GRAD  # so that clipping is part of what is compared
    assert ours.weights.keys() == plain.weights.keys()
    apart = {name: float((ours.weights[name] - weight).abs().max()) for name, weight in plain.weights.items()}
    assert max(apart.values()) < TOLERANCE, apart


def our_curve(family: str, checkpoint: Path, shards: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> Curve:
    """What `python train.py` logs, and what plain transformers reads from the folder `best`, which without val is the last epoch."""
    values: dict[str, object] = {"epochs": EPOCHS, "batch-size": BATCH_SIZE, "seed": SEED, "log-every": 1, "lr": LR * 256 / BATCH_SIZE, "lr-gamma": GAMMA}
    values |= {"lr-milestones": FALLS_AFTER, "warmup": WARMUP_STEPS / (STEPS_PER_EPOCH * EPOCHS), "weight-decay": WEIGHT_DECAY}
    values |= {"clip-grad": CLIP_GRAD, "head-init-scale": HEAD_SCALE, "threads": 1, "dataset-home": shards, "logger-folder": run, "model-name": checkpoint}
    words = [str(word) for flag, value in values.items() for word in (f"--{flag}", value)]
    monkeypatch.setattr(sys, "argv", ["train.py", *PLAIN, *words])
    assert command.run(train.main) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    best = getattr(transformers, CLASS_OF[family]).from_pretrained(run / "best")
    return Curve([line["train/loss"] for line in steps], [line["train/grad_norm"] for line in steps], weights_of(best))


def plain_curve(family: str, checkpoint: Path, head: nn.Module, home: Path) -> Curve:
    """The other loop, with the head's own numbers copied in."""
    model = getattr(transformers, CLASS_OF[family]).from_pretrained(checkpoint, id2label=dict(enumerate(CLASSES)), ignore_mismatched_sizes=True)
    model.classifier.load_state_dict(head.state_dict())
    model.train()
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / WARMUP_STEPS, total_iters=WARMUP_STEPS - 1)
    fall = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[FALLS_AFTER * STEPS_PER_EPOCH], gamma=GAMMA)
    losses, norms = [], []
    for video, label in batches(home):
        pixels = normalised(video, PROCESSOR["image_mean"], PROCESSOR["image_std"], ORDER_OF[family])
        loss = F.cross_entropy(model(pixel_values=pixels).logits, label)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)))
        losses.append(float(loss.detach()))
        for part in (optimizer, rise, fall):
            part.step()
    return Curve(losses, norms, weights_of(model))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All but the biases of keys: they move every score of a query alike, so softmax does not see them and AdamW blows up the rounding of their gradients."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".key.bias")}
    for name in [name for name in weights if name.endswith(".qkv.bias")]:
        query, _, value = weights.pop(name).chunk(3)
        weights |= {f"{name}, query": query, f"{name}, value": value}
    return weights


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    """Matrices and kernels decay; biases, norms, class token and tables do not."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not name.endswith(TABLES)].append(parameter)
    return [{"params": groups[True], "weight_decay": WEIGHT_DECAY}, {"params": groups[False], "weight_decay": 0.0}]


def batches(home: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 (B, T, H, W, 3) and int64 (B,) of every step, read by numpy."""
    for epoch in range(EPOCHS):
        for line in order_lines(OrderConfig(home, seed=SEED, epoch=epoch, batch_size=BATCH_SIZE)):
            keys = json.loads(line)["keys"]
            video = np.stack([source_of(home, key)["video"] for key in keys])
            label = [CLASSES.index(key.split("/")[1]) for key in keys]
            yield torch.from_numpy(video), torch.tensor(label)
