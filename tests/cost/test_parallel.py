"""The work of one device, counted by hand for a small model on a mesh of eight."""

import jax
import pytest
from jax.sharding import AxisType

from moe_jax.cost import parallel
from moe_jax.cost.chips import ChipPeaks
from moe_jax.cost.parallel import StepShape, Training
from moe_jax.cost.roofline import Step, Work, work
from moe_jax.dispatch.choose import choose
from moe_jax.dispatch.contract import Dispatch
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import Layout
from tests import tiny_model

ARCHITECTURE = tiny_model.changed(moe={"num_experts": 16, "k": 2}, attention={"num_kv_heads": 2})
D, F, E, V = 64, 24, 16, 512
DENSE, MOE, LAYERS = 1, 2, 3
MESH = {"data": 2, "expert": 2, "tensor": 2}


def execution_on(**fields):
    mesh = jax.sharding.AbstractMesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 3)
    layout = Layout(mesh, **fields)
    how = Dispatch(mesh=mesh, expert_axes=layout.expert_axes)
    return Execution(ARCHITECTURE, 2, tiny_model.KERNELS, choose(how, "replicated", 2, 2 * D, "tpu"), layout)


def attention_numbers():
    """Of a layer: queries of 4 heads, keys and values of 2, outputs; 16 channels each."""
    return 4 * 16 * D + 2 * 2 * 16 * D + 4 * 16 * D


def test_one_device_is_the_roofline():
    execution = Execution(ARCHITECTURE, 2, tiny_model.KERNELS)
    for load in (StepShape(3, 1, 20, 2), StepShape(2, 8, 0, 1)):
        distinct = MOE * E * (1 - (1 - load.k / E) ** (load.rows * load.new))
        step = Step([load.cached] * load.rows, [load.new] * load.rows, MOE * load.rows * load.new * load.k, distinct)
        share = parallel.share(execution, load, 2)
        assert share.work == pytest.approx(work(ARCHITECTURE, step, 2))
        assert (share.sent_bytes, share.collectives) == (0, 0)


def test_weights_of_a_device_by_hand():
    """Heads and hidden widths in halves; experts in halves over `expert`, or in quarters over `data` too."""
    norms = LAYERS * (2 * D + 2 * 16) + D
    fixed = LAYERS * attention_numbers() // 2 + DENSE * 3 * D * 96 // 2 + MOE * 3 * D * F // 2 + V * D // 2
    router = MOE * (E * D + E)
    experts = MOE * E * 3 * D * F // 2
    for axes, parts in ((("expert",), 2), (("data", "expert"), 4)):
        layout = execution_on(expert_axes=axes).layout
        assert parallel.weight_bytes(ARCHITECTURE, layout, 2) == 2 * (norms + fixed + router + experts // parts)
    assert parallel.cache_bytes(execution_on(expert_axes=axes), 6, 10, 2) == 2 * LAYERS * 3 * 10 * 2 * 1 * 16


def test_cached_latents_are_counted_with_their_padding():
    """24 + 8 channels are 128 for the products of a TPU."""
    latent = {"kind": "latent", "qk_norm": False, "latent_rank": 24, "rope_head_dim": 8}
    architecture = tiny_model.changed(attention=latent | {"nope_head_dim": 16, "value_head_dim": 16})
    for name, channels in (("xla", 32), ("matmul", 128)):
        execution = Execution(architecture, 2, tiny_model.KERNELS._replace(cached_attention=name))
        assert parallel.cache_bytes(execution, 6, 10, 2) == 2 * LAYERS * 6 * 10 * channels


def test_a_decode_step_of_a_device_by_hand():
    """Four rows, two on each half of `data`: every set of experts sees all tokens if they lie over `data` too."""
    load = StepShape(4, 1, 9, 2)
    share = parallel.share(execution_on(expert_axes=("data", "expert")), load, 2)
    distinct = E * (1 - (1 - 2 / E) ** 4)
    norms = LAYERS * (2 * D + 2 * 16) + D
    matrices = LAYERS * attention_numbers() // 2 + DENSE * 3 * D * 96 // 2 + MOE * 3 * D * F // 2 + MOE * E * D
    cached = 2 * 10 * LAYERS * 2 * 1 * 16
    expert = 3 * D * F // 2
    read = matrices + norms + MOE * E + V * D // 2 + MOE * distinct / 4 * expert + cached
    assert share.work.bytes == pytest.approx(2 * read)
    mixed = LAYERS * 2 * 10 * 2 * 4 * 16 // 2
    slots = MOE * 4 * 2 / 4
    assert share.work.flops == pytest.approx(2 * (2 * matrices + mixed + slots * expert + 2 * V * D // 2))
    row = 2 * D
    gathered_and_summed = MOE * ((1 - 1 / 2) + 2 * (1 - 1 / 8)) * 4 * row
    sums = LAYERS + DENSE + 1 + MOE
    assert share.sent_bytes == pytest.approx(gathered_and_summed + sums * 2 * row)
    assert share.collectives == 2 * MOE + sums


def test_fewer_experts_read_less_and_send_no_less():
    execution = execution_on(expert_axes=("data", "expert"))
    shares = [parallel.share(execution, StepShape(4, 1, 9, k), 2) for k in (2, 1)]
    assert shares[1].work.bytes < shares[0].work.bytes and shares[1].sent_bytes == shares[0].sent_bytes


def test_a_training_step_passes_and_gathers_as_often_as_it_must():
    execution, load = execution_on(fsdp=True), StepShape(4, 8, 0, 2)
    one = Training(1000, all_weights=True, teacher=False, remat=False, accumulation=1)
    plain = parallel.training_share(execution, load, 2, one)
    forward = plain.work.flops / 3
    for changed, passes in (({"remat": True}, 4), ({"teacher": True}, 4), ({"all_weights": False}, 2)):
        share = parallel.training_share(execution, load, 2, one._replace(**changed))
        assert share.work.flops == pytest.approx(passes * forward)
    sent = {
        name: parallel.training_share(execution_on(), load, 2, one._replace(**{name: True})).sent_bytes
        - parallel.training_share(execution_on(), load, 2, one).sent_bytes
        for name in ("remat", "teacher")
    }
    assert sent["remat"] == sent["teacher"] == parallel.share(execution_on(), load, 2).sent_bytes
    twice = parallel.training_share(execution, load, 2, one._replace(accumulation=2))
    assert twice.work.flops == pytest.approx(2 * plain.work.flops)
    assert twice.sent_bytes == pytest.approx(2 * plain.sent_bytes)
    moments = 1000 * (2 * 2 + 2 * 4 + 4 * 4)
    assert twice.work.bytes - moments == pytest.approx(2 * (plain.work.bytes - moments))


def test_times():
    chip = ChipPeaks(0, bytes_per_s=10.0, flops_per_s=100.0, link_bytes_per_s=2.0, source="")
    share = parallel.Share(Work(20.0, 500.0), 4.0, 3)
    assert share.floor_s(chip) == 5 + 2
    assert share.estimate_s(chip) == pytest.approx(7 + 3 * 5e-6)
