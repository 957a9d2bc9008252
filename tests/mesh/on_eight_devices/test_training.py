"""Training on a mesh follows training on one device, and a checkpoint moves between meshes."""

import functools

import jax
import numpy as np
import pytest

from moe_jax.checkpoint.orbax import Checkpoints
from moe_jax.config import gin
from moe_jax.config.mesh import MeshConfig
from moe_jax.engine.request import execution_of
from moe_jax.model.sharding import layout_of
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.training.step import NOTHING_FIXED, make_step, start
from tests import tiny_training

ROWS, LENGTH = 8, 64
CHANGED = {"training.batch_size": ROWS, "training.steps": 20, "attention.num_heads": 4, "attention.num_kv_heads": 2}
CONFIG = gin.read_config(None, [f"{name}={value!r}" for name, value in (tiny_training.SMALL | CHANGED).items()])
MESHES = {
    "one": MeshConfig(),
    "2x4": MeshConfig(2, 4),
    "2x4 both": MeshConfig(2, 4, expert_axes=("data", "expert")),
    "8x1": MeshConfig(8, 1),
    "4x2 fsdp": MeshConfig(4, 2, fsdp=4),
    "2x2x2 fsdp": MeshConfig(2, 2, 2, fsdp=2),
    "2x4 all_to_all": MeshConfig(2, 4, dispatch="all_to_all"),
    "2x2x2 fsdp ragged": MeshConfig(2, 2, 2, fsdp=2, dispatch="ragged"),
}
wide = functools.partial(pytest.param, marks=pytest.mark.processes)


def batch(number):
    tokens_BT = np.random.default_rng(number).integers(0, 60, (ROWS, LENGTH + 1)).astype(np.int32)
    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    rows = {"tokens_BT": tokens_BT[:, :-1], "labels_BT": tokens_BT[:, 1:]}
    return rows | {"segments_BT": np.ones((ROWS, LENGTH), np.int32), "positions_BT": positions_BT}


class Run:
    """A run on a mesh, step by step."""

    def __init__(self, name):
        architecture = CONFIG.architecture
        execution = execution_of(architecture, layout=layout_of(MESHES[name], architecture), training=True)
        self._live = policies.settings([MODEL_OWN] * ROWS, architecture, execution.k_max)
        self._step = make_step(execution, CONFIG.training, CONFIG.objective)
        self.state, self.done = start(execution, CONFIG.training, 0), 0

    def losses(self, count):
        made = []
        for _ in range(count):
            self.state, metrics = self._step(self.state, NOTHING_FIXED, batch(self.done), self._live)
            self.done += 1
            made.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
        return np.array(made)


@functools.cache
def alone():
    return Run("one").losses(20)


@pytest.mark.parametrize(
    "name", ["2x2x2 fsdp", *map(wide, ("2x4", "2x4 both", "8x1", "4x2 fsdp", "2x4 all_to_all", "2x2x2 fsdp ragged"))]
)
def test_twenty_steps_follow_one_device(name):
    run = Run(name)
    losses = run.losses(20)
    np.testing.assert_allclose(losses, alone(), rtol=0, atol=1e-4)
    assert losses[0, 0] - losses[-1, 0] > 0.5  # or nothing was learned
    moments = run.state.optimizer[1][0].mu
    for params in (run.state.params, moments):
        down_LEDF = params["moe"]["experts"]["down_LEDF"]
        mesh = MESHES[name]
        parts = (1, mesh.expert_parts, mesh.fsdp, mesh.tensor)
        assert down_LEDF.sharding.shard_shape(down_LEDF.shape) == tuple(map(int.__floordiv__, down_LEDF.shape, parts))


@pytest.mark.processes
@pytest.mark.parametrize("name", ["8x1", "one", "2x2x2 fsdp"])
def test_a_checkpoint_of_one_mesh_resumes_on_another(tmp_path, name):
    run = Run("2x4")
    run.losses(5)
    written = Checkpoints(tmp_path, 1)
    written.save(5, run.state, {})
    written.close()
    other = Run(name)
    like = other.state
    checkpoints = Checkpoints(tmp_path, 1)
    other.state, _ = checkpoints.restore(5, like)
    checkpoints.close()
    other.done = 5
    for restored, expected, fresh in zip(*map(jax.tree.leaves, (other.state, run.state, like))):
        np.testing.assert_array_equal(np.asarray(restored), np.asarray(expected))
        assert restored.sharding.is_equivalent_to(fresh.sharding, restored.ndim)
    np.testing.assert_allclose(other.losses(3), run.losses(3), rtol=0, atol=1e-4)
