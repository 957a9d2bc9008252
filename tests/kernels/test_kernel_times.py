"""The device's own time, from a profile with two streams of a GPU, one other line and the host's threads."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from tests import launcher_module

times = launcher_module.import_launcher("kernel_times", "benchmarks")

PROFILE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "multiply" } }
  event_metadata { key: 2 value { id: 2 name: "memcpy32_post" } }
  event_metadata { key: 3 value { id: 3 name: "jit_run" } }
  lines {
    name: "Stream #14(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 12000000 }
    events { metadata_id: 1 offset_ps: 20000000 duration_ps: 14000000 }
    events { metadata_id: 2 offset_ps: 40000000 duration_ps: 1000000 }
  }
  lines {
    name: "Stream #15(Compute)"
    events { metadata_id: 2 offset_ps: 0 duration_ps: 3000000 }
  }
  lines {
    name: "XLA Modules"
    events { metadata_id: 3 offset_ps: 0 duration_ps: 500000000 }
  }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "multiply" } }
  lines {
    name: "Stream of launches"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 700000000 }
  }
}
"""


def test_kernels_on_the_streams_of_a_gpu_are_summed_by_name():
    figures = times.summed(ProfileData.from_text_proto(PROFILE), calls=2)
    assert figures == {
        "device_us": pytest.approx((12 + 14 + 1 + 3) / 2),
        "kernels": {"multiply": [13.0, 1.0], "memcpy32_post": [2.0, 1.0]},
    }
    assert times.rate(30e6, {"us": 60.0, **figures}) == pytest.approx(2e6)


def test_off_a_gpu_there_is_the_clock_alone():
    figures = times.time_of(jax.jit(lambda x: x + 1), (jnp.ones(8),), calls=4)
    assert figures.keys() == {"us", "us_low", "us_high"}
    assert 0 < figures["us_low"] <= figures["us"] <= figures["us_high"]
    assert times.rate(6.0, {"us": 3.0}) == 2.0
