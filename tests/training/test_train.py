"""Training as a user runs it: the resulting model; refused, diverging and interrupted runs. `faults/` kills it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax import checkpoint
from moe_jax.checkpoint.orbax import Checkpoints
from moe_jax.config.gin import read_config
from moe_jax.engine.request import execution_of
from moe_jax.training import pretraining
from moe_jax.training.step import start
from tests import launcher_module, tiny_training

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[2]


def command(sources, out, **more):
    flags = [f"--set={override}" for override in tiny_training.overrides(sources, **more)]
    return [sys.executable, str(ROOT / "launch" / "train.py"), f"--out={out}", *flags]


def test_a_run_ends_with_a_model_that_has_learnt(sources, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(command(sources, out), check=True, capture_output=True, text=True)
    result = json.loads((out / "result.json").read_text())
    assert result["figures"]["bits_per_byte"]["value"] < 6  # untrained: log2(384) per token of 1.6 bytes
    assert f"{result['figures']['bits_per_byte']['value']:.4f}" in done.stdout
    assert "bits per byte" in (out / "model" / "MODEL_CARD.md").read_text()
    assert (out / "model" / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    params = checkpoint.open(out / "model").read("float32")
    assert np.isfinite(params["embedding_VD"]).all()


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    config = read_config(None, tiny_training.overrides(sources, **{"training.steps": 8}))
    return config, pretraining.prepare_text(config, tmp_path_factory.mktemp("prepared"))


def test_divergence_stops_and_keeps_the_last_good_checkpoint(prepared, sources, tmp_path):
    _, text = prepared
    config = read_config(
        None,
        tiny_training.overrides(
            sources, **{"training.steps": 8, "training.learning_rate": 1e25, "training.checkpoint_every": 1}
        ),
    )
    execution = execution_of(config.architecture)
    with pytest.raises(ValueError, match=r"step \d+ is not finite .* the last good checkpoint is that of step \d"):
        pretraining.train(config, tmp_path, text, execution)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    last = checkpoints.latest_step
    state, _ = checkpoints.restore(last, start(execution, config.training, 0))
    checkpoints.close()
    assert 1 <= last < 8
    assert np.isfinite(state.params["embedding_VD"]).all()


def test_another_configuration_or_text_is_refused(prepared, sources, tmp_path):
    config, text = prepared
    execution = execution_of(config.architecture)
    pretraining.train(config, tmp_path, text, execution)
    other = read_config(None, tiny_training.overrides(sources, **{"training.steps": 8, "training.learning_rate": 1e-4}))
    with pytest.raises(ValueError, match=r"training.learning_rate = 0.0001: .* was started with 0.003"):
        pretraining.train(other, tmp_path, text, execution)
    changed = text._replace(corpus=text.corpus.__class__(text.corpus.documents, text.corpus.statistics, "0" * 64))
    with pytest.raises(ValueError, match=r"text\.sources: its contents changed"):
        pretraining.train(config, tmp_path, changed, execution)


def test_policies_that_cannot_be_compared_are_refused_before_training(sources, tmp_path):
    flags = tiny_training.overrides(sources, **{"evaluation.policies": ("model", "budget:4")})
    settings = dict(flag.split("=", 1) for flag in flags)
    with pytest.raises(ValueError, match="'budget:4', which looks at all rows of a decode step: expected policies"):
        launcher_module.run_main("train", settings, tmp_path)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_a_checkpoint(sources, tmp_path):
    out = tmp_path / "out"
    more = {"training.steps": 5000, "training.checkpoint_every": 5000, "training.evaluate_every": 5000}
    with subprocess.Popen(
        command(sources, out, **more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        stderr = process.stderr.read()
    assert process.returncode == 130
    assert stderr.rstrip().endswith("interrupted")
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
