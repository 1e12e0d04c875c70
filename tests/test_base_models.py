"""One real training step of each published architecture, random weights, on a CPU, each in a process of its own: it runs, and its memory is what was estimated.

About 25, 25, 190 and 250 CPU seconds, and 2 to 6.5 GiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
MOST_BYTES = 8e9
# The memory of a process is what Linux counts for it alone: the greatest since the kernel was asked to forget (getrusage's also counts the process that
# started this one). AdamW's moments are there before the step, as in all steps but the first.
CODE = """
import gc, json, os, sys, torch
from itertools import repeat
from pathlib import Path
from benchmarks.step_sides import STORED, cached_batch, random_model
from models.costs import estimate
from training.meter import Meter
from training.optimizer import OptimizerConfig, build_optimizer, set_lr
from training.precision import Precision
from training.step import gradients

def held(kind):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

name, geometry, checkpointed = sys.argv[1], sys.argv[2], sys.argv[3] == "checkpointed"
torch.set_num_threads(min(4, len(os.sched_getaffinity(0))))
precision = Precision("fp32", torch.device("cpu"))
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
before = held("VmRSS")
model = random_model(name, geometry, STORED).train()
model.checkpoint_activations(checkpointed)
optimizer = build_optimizer(model, OptimizerConfig(), model.layer_of, model.num_layers)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
optimizer.zero_grad(set_to_none=True)
gc.collect()
cost = estimate(model, None, 1, "fp32")
batch = cached_batch((1, *model.spec.video_shape), precision.device)
Path("/proc/self/clear_refs").write_text("5")
set_lr(optimizer, 1e-4)
loss = gradients(model, repeat(batch), 1, 1, precision, Meter())
learning = [(name, one.grad) for name, one in model.named_parameters() if one.requires_grad]
lacking = [name for name, grad in learning if grad is None or not grad.isfinite().all() or not grad.any()]
norm = precision.step(optimizer, model.parameters(), 1.0)
found = {"loss": loss.item(), "norm": norm.item(), "lacking": lacking, "peak": held("VmHWM") - before, "estimated": cost.step_bytes(checkpointed)}
print(json.dumps(found | {"spec": str(model.spec), "parameters": sum(one.numel() for one in model.parameters())}))
"""
# Clips and millions of parameters: ViT-B with two classes; positions in space and time are weights of TimeSformer alone.
CASES = [
    ("videomae-base", "native", "plain", "16x224x224", 86.23),
    ("timesformer-base", "native", "plain", "8x224x224", 121.26),
    ("videomae-base", "full", "plain", "40x320x320", 86.23),
    ("timesformer-base", "full", "checkpointed", "39x320x320", 121.44),  # 15 GB otherwise
]


@pytest.mark.parametrize(("name", "geometry", "memory", "spec", "millions"), CASES)
def test_a_step_of_a_base_model_runs_in_the_memory_that_was_estimated(name: str, geometry: str, memory: str, spec: str, millions: float) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, name, geometry, memory], cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # Any: JSON
    print(found)
    assert found["spec"] == spec and found["parameters"] / 1e6 == pytest.approx(millions, abs=0.05)
    assert 0 < found["loss"] < 5 and 0 < found["norm"] < 1e4
    assert found["lacking"] == []
    assert found["estimated"] == pytest.approx(found["peak"], rel=0.25)
    assert found["peak"] < MOST_BYTES
