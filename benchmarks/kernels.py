"""Checks and times the kernels of a GPU, one stage per process; `on_device.sh` runs them all.

    python benchmarks/kernels.py --stage decode --out out/kernels
    python benchmarks/kernel_table.py out/kernels

Every result is written as a line of JSON at once. Weights are random. Results are checked against float64 at small
shapes, and against float32 products of some rows at the timed shapes; memory is filled with NaN before. A time is that
of the host's clock, `us`, and on a GPU also the device's own, `device_us`; rates and shares are of the latter.
"""

import argparse
import functools
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from kernel_attention import attention
from kernel_cases import SLOTS, TOLERANCE, Case, ResultsFile, poison, relative, time_all
from kernel_peers import peers, ragged
from kernel_times import rate, time_of

from moe_jax.cost import hardware
from moe_jax.kernels.expert_ffn.api import swiglu
from moe_jax.kernels.grouped_matmul import padded, pallas_gpu, ragged_dot, reference
from moe_jax.kernels.projection import api as projection

Tiles = pallas_gpu.Tiles
PROJECTIONS = {"ours": projection.IMPLEMENTATIONS["pallas_gpu"], "XLA's": projection.IMPLEMENTATIONS["xla"]}
MANY_TILES = [
    pallas_gpu.MANY,
    Tiles(128, 128, 64, 6),
    Tiles(128, 192, 64, 4),
    Tiles(64, 256, 64, 4),
    Tiles(128, 256, 128, 2),
]


def ours(tiles, small=False):
    """(name, forward) of our product with given tiles."""
    if small:
        return "ours", functools.partial(pallas_gpu.forward, tiles=Tiles(64, 64, 64, 2), num_cores=2)
    return f"ours{tuple(tiles)}", functools.partial(pallas_gpu.forward, tiles=tiles)


def gated(small=False):
    """(name, forward) of the product with half of the outputs as gates of the others."""
    settings = {"tiles": Tiles(64, 128, 64, 2), "num_cores": 2} if small else {}

    def forward(rows, weights, sizes, layer):
        halves = weights.reshape(*weights.shape[:2], 2, -1, weights.shape[-1])
        return pallas_gpu.gated(rows, halves, sizes, layer, **settings)

    return "ours, gated", forward


def projected(implementation):
    """The product with one matrix of a stack, of all rows that a case has."""

    def forward(rows, weights, sizes, layer):
        return implementation.forward(rows, weights[:, 0], layer, 1, rows.dtype)

    return forward


def whole_layer(small: bool):
    """(name, forward) of both products of a layer; gate, up-projection and activation are one kernel."""
    cores = 2 if small else None
    gated_tiles, down_tiles = (Tiles(64, 128, 64, 2), Tiles(64, 64, 64, 2)) if small else (None, None)

    def forward(rows, gate_up, down, sizes, layer):
        halves = gate_up.reshape(*gate_up.shape[:2], 2, -1, gate_up.shape[-1])
        hidden = pallas_gpu.gated(rows, halves, sizes, layer, tiles=gated_tiles, num_cores=cores)
        return pallas_gpu.forward(hidden, down, sizes, layer, tiles=down_tiles, num_cores=cores)

    return "ours", forward


def in_two(product, **settings):
    """The forward of a layer as in `moe_jax.model.moe`, with any implementation of the product."""

    def forward(rows, gate_up, down, sizes, layer):
        hidden = swiglu(product(rows, gate_up, sizes, layer, **settings))
        return product(hidden, down, sizes, layer, **settings)

    return forward


def check(results: ResultsFile, small: bool):
    """Small ragged cases against float64: forward and both gradients."""
    experts, outputs, depth = (4, 64, 64) if small else (8, 384, 512)
    rng = np.random.default_rng(zlib.crc32(str(time.time_ns()).encode()))
    num_rows = 72 if small else 1000
    even = [num_rows // experts] * experts
    cases = {
        "even": even,
        "skewed": [num_rows - 3 * (experts - 1) - 5] + [3] * (experts - 1),
        "empty groups": [0, num_rows // 2, 0, num_rows // 3] + [0] * (experts - 4),
        "one expert": [0, 0, num_rows] + [0] * (experts - 3),
        "nothing kept": [0] * experts,
    }
    tiny = {"four rows": (4, [1, 0, 1, 2] + [0] * (experts - 4)), "one row": (8, [0, 0, 1] + [0] * (experts - 3))}
    all_tiles = [pallas_gpu.FEW, pallas_gpu.SEVERAL, pallas_gpu.MANY] if not small else [Tiles(64, 64, 64, 2)]
    if small:
        cases = {"skewed": cases["skewed"]}

    def run(tiles, rows_count, sizes):
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
        rows, weights, out_grad = draw(rows_count, depth), draw(2, experts, outputs, depth), draw(rows_count, outputs)
        sizes, layer = np.asarray(sizes, np.int32), jnp.int32(1)
        poison((2, experts, outputs, depth))
        poison((rows_count, outputs))
        out = _jitted(pallas_gpu.forward, tiles, small)(rows, weights, jnp.asarray(sizes), layer)
        grads = _jitted(pallas_gpu.backward, tiles, small)(rows, weights, jnp.asarray(sizes), layer, out_grad)
        exact = [np.asarray(x, np.float32) for x in (rows, weights, out_grad)]
        expected = (
            reference.forward(*exact[:2], sizes, 1),
            *reference.backward(*exact[:2], sizes, 1, exact[2]),
        )
        errors = [relative(np.asarray(x, np.float32), y) for x, y in zip((out, *grads), expected)]
        return {"errors": errors, "ok": max(errors) < TOLERANCE}

    for tiles in all_tiles:
        for name, sizes in cases.items():
            results.attempt(f"{name} {tuple(tiles)}", run, tiles, num_rows, sizes)
    for name, (rows_count, sizes) in tiny.items():
        results.attempt(f"{name} {tuple(all_tiles[0])}", run, all_tiles[0], rows_count, sizes)


@functools.cache
def _jitted(function, tiles, small):
    return jax.jit(functools.partial(function, tiles=tiles, **({"num_cores": 2} if small else {})))


def ceilings(results: ResultsFile, small: bool):
    """Measures the limits of the device: a copy, a sum, and a product."""
    n = 1 << (20 if small else 30)
    big = jnp.ones((2, n), jnp.bfloat16)

    def copy():
        figures = time_of(jax.jit(lambda x: x + jnp.bfloat16(1)), (big,), 1)
        return figures | {"tb_per_s": rate(2 * big.nbytes, figures) / 1e6}

    def read():
        figures = time_of(jax.jit(lambda x: x.max()), (big,), 1)
        return figures | {"tb_per_s": rate(big.nbytes, figures) / 1e6}

    def product():
        m = 256 if small else 8192
        x, y = (jax.random.normal(jax.random.key(i), (m, m), jnp.bfloat16) for i in range(2))
        figures = time_of(jax.jit(lambda x, y: x @ y.T), (x, y), 1)
        return figures | {"tflops": rate(2 * m**3, figures) / 1e6}

    results.add("device", platform=jax.default_backend(), device=hardware.in_words())
    results.attempt("copy", copy)
    results.attempt("read", read)
    results.attempt("product", product)


def decode(results: ResultsFile, small: bool):
    """One product with few rows per expert, bound by bandwidth; with no rows, the fixed cost of a call; projections."""
    cases = []
    grid = [(name, 1, 8) for name in ("olmoe", "olmoe_down", "v2_lite", "qwen3", "qwen3_down", "v3_local")]
    grid += [("olmoe", 1, 0), ("olmoe", 1, 4), ("olmoe", 8, 8), ("olmoe", 64, 8), ("qwen3", 64, 8)]
    grid += [("qwen3_down", 64, 8), ("v2_lite", 64, 8), ("v3_local", 8, 8), ("v3_local", 64, 8)]
    for shape_name, tokens, k in sorted(grid)[1:2] if small else sorted(grid):
        case = _few(shape_name, tokens, k, small)
        tried = pallas_gpu.candidates("forward", case.slots, case.num_experts)
        tried = tried if (shape_name, tokens) == ("olmoe", 64) else tried[:1]  # those of the rule
        cases += [(case, *ours(tiles, small)) for tiles in tried]
    for tokens in (1,) if small else (1, 8):  # times 8 rows, in more layers than the cache of a GPU holds
        case = Case("projection", tokens, SLOTS, 16, 1 if small else 16, small)
        cases += [(case, name, projected(module)) for name, module in PROJECTIONS.items()]
    time_all(results, cases)


def layer(results: ResultsFile, small: bool):
    """Both products of a layer with few rows per expert, bound by bandwidth; and with half of the experts."""
    cases = []
    for shape_name, peer in (("olmoe", True), ("qwen3", False), ("v2_lite", False), ("v3_local", False)):
        for tokens, k in ((1, 4),) if small else ((1, 8), (1, 4), (8, 8), (64, 8)):
            case = _few(shape_name, tokens, k, small, layer=True)
            cases.append((case, *whole_layer(small)))
            if small or (peer and k == 8 and tokens != 8):
                two = {"tiles": Tiles(64, 64, 64, 2), "num_cores": 2} if small else {}
                cases.append((case, "ours, gate and up first", in_two(pallas_gpu.forward, **two)))
                cases.append((case, "padded", in_two(padded.forward)))
                cases.append((case, "ragged_dot", in_two(ragged_dot.forward)))
    time_all(results, cases[:4] if small else cases)


def _few(shape_name, tokens, k, small, **settings):
    """A case of few rows."""
    stacked = 2 if shape_name.startswith("v3_local") or small else 4
    return Case(shape_name, tokens, k, stacked, 1 if small else 8, small, **settings)


def prefill(results: ResultsFile, small: bool):
    """Many rows per expert, bound by arithmetic; then both gradients."""
    cases = []
    for shape_name, skew in [("olmoe", 0.0), ("olmoe", 0.7), ("olmoe_down", 0.0), ("qwen3", 0.0), ("v3_local", 0.0)]:
        case = Case(shape_name, 4 if small else 8192, 8, 1 if small else 2, 1 if small else 2, small, skew)
        tried = MANY_TILES if shape_name == "olmoe" and not skew else MANY_TILES[:1]
        cases += [(case, *ours(tiles, small)) for tiles in (tried[:1] if small else tried)]
        if not skew and "down" not in shape_name:
            cases.append((case, *gated(small)))
    time_all(results, cases[:2] if small else cases)
    _gradients(results, cases[0][0], small)


def _gradients(results, case, small):
    cores = 2 if small else None
    out_grad = case.rows(case.outputs, 77)
    ((weights,), (rows, *_), (sizes, *_), (layer, *_)), sizes_np = case.arguments, case.sizes_np[0]
    last = np.cumsum(sizes_np)
    for tiles in [Tiles(64, 64, 64, 2)] if small else [pallas_gpu.MANY, Tiles(128, 128, 64, 6)]:

        def to_rows(tiles=tiles):
            call = jax.jit(functools.partial(pallas_gpu.rows_gradient, tiles=tiles, num_cores=cores))
            out = call(out_grad, weights, sizes, layer)
            expert = int(sizes_np.argmax())
            row = int(last[expert]) - 1
            matrix = weights[layer, expert].astype(jnp.float32)
            expected = jnp.dot(out_grad[row].astype(jnp.float32), matrix, precision="highest")
            error = relative(np.asarray(out[row], np.float32), np.asarray(expected))
            figures = time_of(call, (out_grad, weights, sizes, layer), 1)
            return figures | {"error": error, "ok": error < TOLERANCE, "tflops": rate(case.flops, figures) / 1e6}

        def to_weights(tiles=tiles):
            call = jax.jit(functools.partial(pallas_gpu.weights_gradient, tiles=tiles, num_cores=cores))
            out = call(rows, weights, sizes, out_grad)
            errors = []
            for expert in (int(sizes_np.argmax()), int(sizes_np.argmin())):
                own = slice(int(last[expert] - sizes_np[expert]), int(last[expert]))
                pieces = (x[own].astype(jnp.float32) for x in (out_grad, rows))
                expected = jnp.einsum("sf,sd->fd", *pieces, precision="highest")
                errors.append(relative(np.asarray(out[expert], np.float32), np.asarray(expected)))
            figures = time_of(call, (rows, weights, sizes, out_grad), 1)
            error = max(errors)
            return figures | {"error": error, "ok": error < TOLERANCE, "tflops": rate(case.flops, figures) / 1e6}

        results.attempt(f"gradient to rows ours{tuple(tiles)}", to_rows)
        results.attempt(f"gradient to weights ours{tuple(tiles)}", to_weights)


STAGES = {
    function.__name__: function for function in (check, ceilings, decode, layer, prefill, peers, ragged, attention)
}


def main():
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--small", action="store_true", help="tiny shapes in interpret mode, without a GPU")
    flags = parser.parse_args()
    results = ResultsFile(flags.out, flags.stage)
    if flags.small:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        with plgpu.force_gpu_interpret_mode():
            STAGES[flags.stage](results, True)
    else:
        STAGES[flags.stage](results, False)


if __name__ == "__main__":
    main()
