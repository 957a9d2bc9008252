import jax.numpy as jnp
import numpy as np

from moe_jax.cost import hardware
from moe_jax.cost.roofline import Machine


def test_the_best_attempt_counts(monkeypatch):
    """With a fake clock, on which the attempts take 9, 8 and 7 seconds."""
    spans = [(100 * attempt, 100 * attempt + 9 - attempt) for attempt in range(hardware.ATTEMPTS)]
    ticks = iter(np.ravel(spans).tolist())
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))
    assert hardware._best_s(lambda x: x + 1, jnp.float32(1)) == 10 - hardware.ATTEMPTS


def test_bytes_and_operations_are_divided_by_their_seconds(monkeypatch):
    monkeypatch.setattr(hardware, "STREAMED_BYTES", 2**20)
    monkeypatch.setattr(hardware, "WIDTH", 64)
    probe = hardware.Probe(jnp.bfloat16)
    seconds = iter([4.0, 2.0, 8.0, 0.5])
    monkeypatch.setattr(hardware, "_best_s", lambda call, *arguments: [call(*arguments), next(seconds)][1])
    assert probe.measure() == Machine(2**20 / 2, 2 * 64**3 / 0.5)


def test_the_typical_machine_is_the_median_of_each():
    machines = [Machine(1.0, 30.0), Machine(5.0, 20.0), Machine(3.0, 10.0)]
    assert hardware.typical(machines) == Machine(3.0, 20.0)
