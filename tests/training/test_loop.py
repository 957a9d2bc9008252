"""The loop with a step that does nothing: evaluations that are not finite."""

import json

import numpy as np
import pytest

from moe_jax.config.gin import read_config, to_gin
from moe_jax.model.finite import NotFiniteError
from moe_jax.report.plots import draw_training_curve
from moe_jax.text.batches import pack
from moe_jax.training import loop
from moe_jax.training.step import NOTHING_FIXED, State


def run(folder, judged, **settings):
    """Runs one step for each evaluation, which gives a number or, if that is None, raises."""
    overrides = {
        **{"training.steps": len(judged), "training.warmup_steps": 0, "training.batch_size": 1},
        **{"training.evaluate_every": 1, "training.log_every": 1, "training.sequence_length": 4},
        **settings,
    }
    config = read_config(None, [f"{name}={value}" for name, value in overrides.items()])
    answers = iter(judged)

    def judge(state):
        answer = next(answers)
        if answer is None:
            raise NotFiniteError("the log-probabilities of a text: not finite")
        return answer

    def step(state, fixed, batch, live):
        return state._replace(params={"w": state.params["w"] + 1}), {"loss": np.float32(1)}

    state = State({"w": np.zeros(1, np.float32)}, None, None)
    packed = pack([np.arange(4, dtype=np.int32)] * 8, 4)
    task = loop.TrainingTask(state, NOTHING_FIXED, step, lambda number: None, judge, packed, {}, keep_best=True)
    return loop.run(config, folder, task)


def test_an_evaluation_that_is_not_finite_is_no_better_and_is_null(tmp_path, caplog):
    outcome = run(tmp_path, [3.0, None, 2.0, None])
    assert (outcome.step, outcome.steps, outcome.state.params["w"]) == (3, 4, 3)
    assert "held-out text after step 2: the log-probabilities of a text: not finite" in caplog.text
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in written]
    assert [line["bits_per_byte"] for line in lines if "bits_per_byte" in line] == [3.0, None, 2.0, None]
    assert draw_training_curve(tmp_path / "metrics.jsonl").startswith(b"\x89PNG")


def test_a_run_without_a_finite_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no evaluation of the 2 steps was finite"):
        run(tmp_path, [None, None])


CAPACITY = {"mesh.capacity": 1.0, "mesh.data": 2, "mesh.expert": 2}


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"mesh.expert": 4}, {"mesh.expert": 2}, ""),
        (CAPACITY, CAPACITY | {"mesh.data": 1}, "mesh.data = 1"),
        (CAPACITY, CAPACITY | {"mesh.dispatch": "ragged"}, "mesh.dispatch = 'ragged'"),
        (CAPACITY, {"mesh.expert": 2}, "mesh.capacity = 0.0"),
        ({"mesh.expert": 2}, CAPACITY, "mesh.capacity = 1.0"),
    ],
)
def test_a_run_that_drops_slots_stays_on_its_mesh(tmp_path, before, now, named):
    """Which slots are dropped depends on the mesh and the dispatch; without a capacity a run may move."""
    before, now = (read_config(None, [f"{name}={value}" for name, value in given.items()]) for given in (before, now))
    (tmp_path / "run.gin").write_text(to_gin(before))
    if not named:
        loop.require_same_run(now, tmp_path)
        return
    with pytest.raises(ValueError, match=f"^{named}: the run in .* was started with"):
        loop.require_same_run(now, tmp_path)
