"""What a dispatch sends, drops and keeps in place, read from compiled programs and from what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding

from moe_jax.cost.collectives import collectives
from moe_jax.dispatch import all_to_all, ragged
from moe_jax.dispatch.api import dispatch
from moe_jax.dispatch.contract import Dispatch, Experts
from moe_jax.routing.selection import Selection
from tests.dispatch import routed

DEVICES, TOKENS = 8, 64


def compiled(how, k=routed.K, tokens=TOKENS, experts=None):
    """The program of one dispatch with experts in place, of k slots per token."""
    experts = experts or routed.experts()
    placed = jax.tree.map(lambda part, spec: NamedSharding(how.mesh, spec), experts, how.experts_specs)
    experts = jax.device_put(experts, placed)
    selection = Selection(*(part[:, :k] for part in routed.selection("even", tokens)))
    x_ND = routed.tokens(tokens, experts.down_LEDF.shape[2])
    run = jax.jit(lambda *operands: dispatch(*operands, "blocked", how))
    return run.lower(x_ND, selection, experts).compile()


def sent(program, *names):
    """Bytes that the collectives of these names send, from all devices."""
    return DEVICES * sum(one.sent_bytes for one in collectives(program.as_text()) if one.name in names)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_all_to_all_sends_at_most_k_rows_of_a_token(mesh_of, sizes):
    capacity, of_k = 1.5, []  # blocks of whole rows at both k
    for k in (4, 2):
        program = compiled(Dispatch("all_to_all", mesh_of(sizes), capacity=capacity, drop=True), k)
        of_k.append(sent(program, "all-to-all"))
        arrays = DEVICES * sum(one.array_bytes for one in collectives(program.as_text()) if one.name == "all-to-all")
        assert 0 < of_k[-1] < arrays <= 2 * k * TOKENS * routed.D * 4 * capacity
    assert of_k[1] == of_k[0] / 2


@pytest.mark.parametrize(
    ("name", "collective", "times"),
    [("replicated", {"all-reduce"}, 2), ("all_gather", {"all-gather", "reduce-scatter"}, 2)],
)
def test_others_send_the_same_whatever_the_number_of_slots(mesh_of, name, collective, times):
    """As much as tensor parallelism; `all_gather` sends the router's choice as well, which is small."""
    of_k = []
    for k in (4, 2):
        found = collectives(compiled(Dispatch(name, mesh_of((1, 8, 1))), k).as_text())
        rows = [one for one in found if one.array_bytes >= TOKENS * routed.D * 4]
        assert {one.name for one in rows} == collective
        of_k.append(DEVICES * sum(one.sent_bytes for one in rows))
        choice = sum(one.array_bytes for one in found) - sum(one.array_bytes for one in rows)
        assert choice <= TOKENS * (k * 9 + 4)  # an int32, a float32 and a bool of each slot
    assert of_k[0] == of_k[1] == times * (DEVICES - 1) * TOKENS * routed.D * 4


def test_ragged_sends_only_kept_slots(mesh_of):
    how, of_live = Dispatch("ragged", mesh_of((2, 4, 1))), []
    run = jax.jit(lambda *operands: dispatch(*operands, "blocked", how)[1])
    for live in (4, 2, 1):
        selection = routed.selection("even", TOKENS)
        selection = selection._replace(keep_NK=selection.keep_NK & (np.arange(routed.K) < live)[None])
        counts = run(routed.tokens(TOKENS), selection, routed.experts())
        home_N = np.arange(TOKENS) // (TOKENS // DEVICES) % 4  # the shard of experts where a token lives
        away_NK = selection.keep_NK & (selection.expert_NK // 4 != home_N[:, None])
        assert counts.sent == away_NK.sum() <= TOKENS * live
        of_live.append(int(counts.sent))
    assert of_live[1] == pytest.approx(of_live[0] / 2, rel=0.1)
    assert of_live[2] == pytest.approx(of_live[0] / 4, rel=0.1)


def kept_by_capacity(name, selection, how):
    """The slots that find room, by loops; slots of a device go by expert, then by token."""
    keep_NK, shards, own = np.zeros_like(selection.keep_NK), how.expert_shards, routed.EXPERTS // how.expert_shards
    here = TOKENS // DEVICES
    for group in range(DEVICES // shards):
        slots = [
            (selection.expert_NK[token, slot], token // here, token, slot)
            for token, slot in np.argwhere(selection.keep_NK)
            if token // here // shards == group
        ]
        blocks = {}
        for expert, device, token, slot in sorted(slots):
            if name == "all_to_all":
                block = blocks.setdefault((device, expert // own), [])
                room = all_to_all.block_rows(here, routed.K, own, how)
            else:
                block = blocks.setdefault(expert // own, [])
                room = ragged.received_rows(here, routed.K, own, how)
            if len(block) < room:
                block.append(slot)
                keep_NK[token, slot] = True
    return keep_NK


@pytest.mark.parametrize("name", ["all_to_all", "ragged"])
def test_overflow_is_counted_and_the_rest_computed(mesh_of, name):
    how = Dispatch(name, mesh_of((2, 4, 1)), capacity=0.75, drop=True)
    run = jax.jit(lambda *operands: dispatch(*operands, "blocked", how))
    for load in ("even", "skewed", "dropped"):
        selection, x_ND, experts = routed.selection(load, TOKENS), routed.tokens(TOKENS), routed.experts()
        y_ND, counts = run(x_ND, selection, experts)
        keep_NK = kept_by_capacity(name, selection, how)
        assert counts.overflow == selection.keep_NK.sum() - keep_NK.sum()
        assert counts.load_E.sum() == selection.keep_NK.sum()
        if load != "dropped":
            assert counts.overflow > 0
        expected_ND = routed.expected(x_ND, selection._replace(keep_NK=keep_NK), experts)
        assert np.linalg.norm(y_ND - expected_ND) <= 1e-5 * np.linalg.norm(expected_ND)


@pytest.mark.parametrize("name", ["replicated", "all_gather", "all_to_all", "ragged"])
def test_experts_stay_where_they_are(mesh_of, name):
    """In a loop over layers no program gathers weights or copies a layer of them."""
    how, layers, d_model = Dispatch(name, mesh_of((2, 2, 2))), 3, 256
    random = np.random.default_rng(0)
    gate_up = random.standard_normal((layers, routed.EXPERTS, 2, 64, d_model)).astype(np.float32)
    down = random.standard_normal((layers, routed.EXPERTS, d_model, 64)).astype(np.float32)
    specs = how.experts_specs
    weights = [jax.device_put(part, NamedSharding(how.mesh, spec)) for part, spec in zip((gate_up, down), specs)]

    @jax.jit
    def step(x_ND, selection, gate_up, down):
        def layer(number, x_ND):
            experts = Experts(gate_up, down, number)
            return x_ND + dispatch(x_ND, selection, experts, "blocked", how)[0]

        return lax.fori_loop(0, layers, layer, x_ND)

    program = step.lower(routed.tokens(4, d_model), routed.selection("even", 4), *weights).compile()
    of_a_layer = (gate_up[0].nbytes + down[0].nbytes) // 4  # of one device
    assert sum(part.nbytes for part in weights) // 4 == layers * of_a_layer
    moved = [one for one in collectives(program.as_text()) if one.array_bytes >= of_a_layer // routed.EXPERTS]
    assert moved == []
    assert program.memory_analysis().temp_size_in_bytes < of_a_layer


def documented(operand, output, begin, send, arrive, received, *, axis_name):
    """jax.lax.ragged_all_to_all, as its documentation says in loops; every device sees what all send."""
    devices, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    operands, begins, sends, arrives = (lax.all_gather(one, axis_name) for one in (operand, begin, send, arrive))
    slices = len(begin) // devices
    for source in range(devices):
        for number in range(slices):
            at = me * slices + number
            row = jnp.arange(len(output))
            held = (row >= arrives[source, at]) & (row < arrives[source, at] + received[source * slices + number])
            held &= row < arrives[source, at] + sends[source, at]
            new = operands[source].at[begins[source, at] + row - arrives[source, at]].get(mode="clip")
            output = jnp.where(held[:, None], new, output)
    return output


def test_ragged_tells_the_primitive_what_its_emulation_does(mesh_of, monkeypatch):
    mesh = mesh_of((2, 4, 1))
    for drop in (False, True):
        how = Dispatch("ragged", mesh, capacity=0.75, drop=drop)

        def loss(x_ND, selection, experts, how=how):
            y_ND, counts = dispatch(x_ND, selection, experts, "ragged_dot", how)
            return (y_ND * jnp.cos(jnp.arange(y_ND.size)).reshape(y_ND.shape)).sum(), (y_ND, counts)

        operands = routed.tokens(TOKENS), routed.selection("dropped", TOKENS), routed.experts()
        emulated = jax.jit(jax.grad(loss, has_aux=True))(*operands)
        with monkeypatch.context() as patched:
            patched.setattr(ragged, "is_emulated", lambda how: False)
            patched.setattr(lax, "ragged_all_to_all", documented)
            told = jax.jit(jax.grad(loss, has_aux=True))(*operands)
        for one, other in zip(jax.tree.leaves(emulated), jax.tree.leaves(told), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "local"}, "expected every expert on each device, got 4 shards"),
        ({"name": "elsewhere"}, "expected one of local, replicated, all_gather, all_to_all, ragged"),
        ({"expert_axes": ("tensor",)}, r"expected \('expert',\) or \('data', 'expert'\)"),
        ({"capacity": 0.0}, "expected a positive number"),
        ({"mesh": None}, "expected local, or a mesh"),
    ],
)
def test_refusals(mesh_of, change, words):
    settings = {"name": "replicated", "mesh": mesh_of((2, 4, 1))} | change
    with pytest.raises(ValueError, match=words):
        dispatch(routed.tokens(8), routed.selection("even", 8), routed.experts(), "blocked", Dispatch(**settings))


def test_a_mesh_that_does_not_divide_is_refused(mesh_of):
    experts = jax.tree.map(lambda part: part[:, :14] if part.ndim else part, routed.experts())
    how = Dispatch("replicated", mesh_of((2, 4, 1)))
    with pytest.raises(ValueError, match="experts = 14: expected a multiple of 4, the size of mesh axis expert"):
        dispatch(routed.tokens(8), routed.selection("even", 8), experts, "blocked", how)
