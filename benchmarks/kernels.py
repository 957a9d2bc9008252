"""Checks and times the grouped matmul of a GPU, one stage per process; `on_device.sh` runs them all.

    python benchmarks/kernels.py --stage decode --out out/kernels
    python benchmarks/kernels.py --stage table --out out/kernels

Every case is kept as a line of JSON as soon as it is known. Weights are drawn at random. Each timed program makes
several calls, each with a layer, rows and group sizes of its own, so that nothing is found in a cache. A time is the
median over runs of one program, divided by its calls. What is right is checked against float64 at small shapes, and
against float32 products of some rows at the timed ones; memory is filled with NaN first.
"""

import argparse
import concurrent.futures
import functools
import json
import pathlib
import statistics
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.kernels.grouped_matmul import padded, pallas_gpu, ragged_dot, reference

Tiles = pallas_gpu.Tiles
RESULTS = "kernels.jsonl"
TOLERANCE = 1e-2  # of bfloat16, relative in norm; NaN never passes
# (experts, outputs, depth): gate and up together, and down
SHAPES = {
    "olmoe": (64, 2048, 2048),
    "olmoe_down": (64, 2048, 1024),
    "v2_lite": (64, 2816, 2048),
    "v2_lite_down": (64, 2048, 1408),
    "qwen3": (128, 1536, 2048),
    "qwen3_down": (128, 2048, 768),
    "v3_local": (32, 4096, 7168),
    "v3_local_down": (32, 7168, 2048),
}
FEW_TILES = [
    pallas_gpu.FEW,
    Tiles(64, 64, 256, 3),
    Tiles(64, 64, 64, 12),
    Tiles(64, 128, 128, 4),
    Tiles(64, 128, 64, 8),
    Tiles(64, 256, 64, 4),
]
MANY_TILES = [
    pallas_gpu.MANY,
    Tiles(128, 128, 64, 6),
    Tiles(128, 192, 64, 4),
    Tiles(64, 256, 64, 4),
    Tiles(128, 256, 128, 2),
]


class Journal:
    """Results, appended to a file as they come."""

    def __init__(self, folder: pathlib.Path, stage: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RESULTS
        self._stage, self._start = stage, time.perf_counter()

    def add(self, name: str, **figures):
        """Keeps one result and shows it."""
        at_s = round(time.perf_counter() - self._start, 1)
        line = json.dumps({"stage": self._stage, "name": name, "at_s": at_s, **figures})
        print(line, flush=True)
        with open(self._path, "a") as file:
            print(line, file=file)

    def attempt(self, name: str, case, *arguments):
        """Runs a case; an error is a result too."""
        try:
            self.add(name, **case(*arguments))
        except Exception as error:  # one case must not end the others
            self.add(name, error=f"{type(error).__name__}: {str(error)[:300]}")


def draw_sizes(rng, num_experts: int, tokens: int, k: int, skew: float = 0.0) -> np.ndarray:
    """Rows of each expert where every token chooses k different ones; `skew` is the spread of their log weights."""
    log_weights = skew * rng.normal(size=num_experts)
    scores = log_weights + rng.gumbel(size=(tokens, num_experts))
    chosen = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return np.bincount(chosen.ravel(), minlength=num_experts).astype(np.int32)


def poison(shape):
    """Leaves NaN in the memory that the next arrays are likely to get."""
    for _ in range(2):
        jnp.full(shape, jnp.nan, jnp.bfloat16).block_until_ready().delete()


def relative(out, expected) -> float:
    """Distance over length; infinite where it is not a number."""
    error = np.linalg.norm(np.float64(out) - expected) / max(np.linalg.norm(expected), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def seconds_of(call, arguments, calls: int, samples: int = 5) -> dict:
    """Median time of one of the `calls` that a program makes; programs are queued so that the device does not wait."""
    jax.block_until_ready(call(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    once_s = time.perf_counter() - start
    if once_s > 1:  # a slow peer, or a rehearsal
        return {"us": 1e6 * once_s / calls, "us_low": 0.0, "us_high": 0.0}
    repeats = max(1, min(50, int(0.02 / max(once_s, 1e-6))))
    times_us = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            out = call(*arguments)
        jax.block_until_ready(out)
        times_us.append(1e6 * (time.perf_counter() - start) / (repeats * calls))
    return {"us": statistics.median(times_us), "us_low": min(times_us), "us_high": max(times_us)}


@functools.cache
def stack(shape_name: str, layers: int, small: bool):
    """Weights [L, E, F, D], a layer at a time, so that no float32 copy of the whole is made."""
    num_experts, outputs, depth = sizes_of(shape_name, small)
    draw = jax.jit(lambda key: jax.random.normal(key, (num_experts, outputs, depth), jnp.bfloat16))
    return jnp.stack([draw(key) for key in jax.random.split(jax.random.key(len(shape_name)), layers)])


def sizes_of(shape_name: str, small: bool):
    """(experts, outputs, depth) of a named shape; of all shapes the same tiny one for rehearsals."""
    return (8, 128, 128) if small else SHAPES[shape_name]


class Case:
    """Operands for several calls; arrays are drawn when first asked for."""

    def __init__(self, shape_name, tokens, k, layers, calls, small, skew=0.0):
        self.name = f"{shape_name} {tokens}x{k}" + (f" skew {skew}" if skew else "")
        self.shape = shape_name, layers, small
        self.num_experts, self.outputs, self.depth = sizes_of(shape_name, small)
        self.calls, self.slots, self.small = calls, tokens * k, small
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        self.sizes_np = [draw_sizes(rng, self.num_experts, tokens, k, skew) for _ in range(calls)]
        self.layers = [jnp.int32(i % layers) for i in range(calls)]

    @property
    def weights(self):
        """[L, E, F, D], shared with the other cases of that shape."""
        return stack(*self.shape)

    def rows(self, width: int, number: int):
        """bfloat16 [S, width]."""
        return jax.random.normal(jax.random.key(1000 * self.slots + number), (self.slots, width), jnp.bfloat16)

    @functools.cached_property
    def arguments(self):
        """Of the program of all calls."""
        rows = [self.rows(self.depth, number) for number in range(self.calls)]
        return self.weights, rows, [jnp.asarray(sizes) for sizes in self.sizes_np], self.layers

    def compile(self, forward):
        """All calls in one program, compiled. The inner function is traced and lowered once."""
        inner = jax.jit(forward)

        def run(weights, rows, sizes, layers):
            return [inner(r, weights, s, layer) for r, s, layer in zip(rows, sizes, layers)]

        shape = jax.ShapeDtypeStruct
        weights = shape((self.shape[1], self.num_experts, self.outputs, self.depth), jnp.bfloat16)
        rows = [shape((self.slots, self.depth), jnp.bfloat16)] * self.calls
        sizes = [shape((self.num_experts,), jnp.int32)] * self.calls
        return jax.jit(run).lower(weights, rows, sizes, [shape((), jnp.int32)] * self.calls).compile()

    @property
    def bytes_read(self) -> float:
        """Least bytes per call: each chosen expert's weights once, rows in and out once."""
        kept = np.mean([(sizes > 0).sum() for sizes in self.sizes_np])
        return 2.0 * (kept * self.outputs * self.depth + self.slots * (self.outputs + self.depth))

    @property
    def flops(self) -> float:
        """Of one call."""
        return 2.0 * self.slots * self.outputs * self.depth

    def error(self, outs) -> float:
        """The largest relative error among the calls, over some rows of each."""
        errors = []
        for out, rows, sizes, layer in zip(outs, self.arguments[1], self.sizes_np, self.layers):
            held = int(sizes.sum())
            chosen = np.unique(np.linspace(0, held - 1, 16, dtype=int))
            chosen = np.resize(chosen, 16)
            experts = np.searchsorted(np.cumsum(sizes), chosen, side="right")
            expected = np.asarray(_products(rows, self.weights, layer, jnp.asarray(chosen), jnp.asarray(experts)))
            if out.shape[1] < self.outputs:  # the gated form
                gate, up = np.split(expected, 2, axis=1)
                expected = gate / (1 + np.exp(-gate)) * up
            errors.append(relative(np.asarray(out[jnp.asarray(chosen)], np.float32), expected))
            if not bool(jnp.isfinite(out.astype(jnp.float32)).all()):
                errors.append(float("inf"))
        return max(errors)


@jax.jit
def _products(rows, weights, layer, chosen, experts):
    def product(_, at):
        row, expert = at
        matrix = weights[layer, expert].astype(jnp.float32)
        return None, jnp.dot(matrix, rows[row].astype(jnp.float32), precision="highest")

    return jax.lax.scan(product, None, (chosen, experts))[1]


def time_all(journal: Journal, cases: list):
    """Compiles (case, name, forward) side by side, then checks and times one after the other."""

    def compiled(case, forward):
        start = time.perf_counter()
        return case.compile(forward), round(time.perf_counter() - start, 1)

    small = cases[0][0].small  # what is interpreted keeps to its thread
    pool = concurrent.futures.ThreadPoolExecutor(12)
    programs = [functools.partial(compiled, case, forward) for case, _, forward in cases]
    if not small:
        futures = [pool.submit(program) for program in programs]
        concurrent.futures.wait(futures)
        programs = [future.result for future in futures]
    last = None
    for (case, name, _), program in zip(cases, programs):
        if last and last is not case:
            vars(last).pop("arguments", None)
            if last.shape != case.shape:
                stack.cache_clear()
        last = case
        journal.attempt(f"{case.name} {name}", timed, case, program)
    pool.shutdown()


def timed(case: Case, program) -> dict:
    """Checks and times one program."""
    call, compile_s = program()
    poison((case.slots, case.outputs))
    error = case.error(call(*case.arguments))
    figures = seconds_of(call, case.arguments, case.calls)
    return {
        "error": error,
        "ok": error < TOLERANCE,
        **figures,
        "tb_per_s": case.bytes_read / figures["us"] / 1e6,
        "tflops": case.flops / figures["us"] / 1e6,
        "compile_s": compile_s,
    }


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


def check(journal: Journal, small: bool):
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
    all_tiles = [pallas_gpu.FEW, pallas_gpu.MANY] if not small else [Tiles(64, 64, 64, 2)]
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
            journal.attempt(f"{name} {tuple(tiles)}", run, tiles, num_rows, sizes)
    for name, (rows_count, sizes) in tiny.items():
        journal.attempt(f"{name} {tuple(all_tiles[0])}", run, all_tiles[0], rows_count, sizes)


@functools.cache
def _jitted(function, tiles, small):
    return jax.jit(functools.partial(function, tiles=tiles, **({"num_cores": 2} if small else {})))


def ceilings(journal: Journal, small: bool):
    """What the device reaches: a copy, a sum, and a product."""
    n = 1 << (20 if small else 30)
    big = jnp.ones((2, n), jnp.bfloat16)

    def copy():
        figures = seconds_of(jax.jit(lambda x: x + jnp.bfloat16(1)), (big,), 1)
        return figures | {"tb_per_s": 2 * big.nbytes / figures["us"] / 1e6}

    def read():
        figures = seconds_of(jax.jit(lambda x: x.max()), (big,), 1)
        return figures | {"tb_per_s": big.nbytes / figures["us"] / 1e6}

    def product():
        m = 256 if small else 8192
        x, y = (jax.random.normal(jax.random.key(i), (m, m), jnp.bfloat16) for i in range(2))
        figures = seconds_of(jax.jit(lambda x, y: x @ y.T), (x, y), 1)
        return figures | {"tflops": 2 * m**3 / figures["us"] / 1e6}

    journal.add("device", kind=jax.devices()[0].device_kind, platform=jax.default_backend(), jax=jax.__version__)
    journal.attempt("copy", copy)
    journal.attempt("read", read)
    journal.attempt("product", product)


def decode(journal: Journal, small: bool):
    """Few rows per expert: bandwidth."""
    cases = []
    grid = [("olmoe", 1, 8), ("olmoe", 8, 8), ("olmoe", 64, 8), ("olmoe", 1, 4), ("qwen3", 1, 8), ("qwen3", 8, 8)]
    grid += [("qwen3", 64, 8), ("v2_lite", 1, 8), ("v2_lite", 64, 8), ("olmoe_down", 1, 8), ("qwen3_down", 64, 8)]
    grid += [("v3_local", tokens, 8) for tokens in (1, 8, 64)]
    for shape_name, tokens, k in grid:
        case = Case(shape_name, tokens, k, 2 if shape_name == "v3_local" or small else 4, 1 if small else 8, small)
        tried = FEW_TILES if (shape_name, k) == ("olmoe", 8) and tokens != 8 else FEW_TILES[:1]
        cases += [(case, *ours(tiles, small)) for tiles in (tried[:1] if small else tried)]
        if shape_name == "olmoe":
            cases += [(case, *gated(small)), (case, "padded", padded.forward)]
    time_all(journal, cases[:2] if small else cases)


def prefill(journal: Journal, small: bool):
    """Many rows per expert: arithmetic; then both gradients."""
    cases = []
    for shape_name, skew in [("olmoe", 0.0), ("olmoe", 0.7), ("olmoe_down", 0.0), ("qwen3", 0.0), ("v3_local", 0.0)]:
        case = Case(shape_name, 4 if small else 8192, 8, 1 if small else 2, 1 if small else 2, small, skew)
        tried = MANY_TILES if shape_name == "olmoe" and not skew else MANY_TILES[:1]
        cases += [(case, *ours(tiles, small)) for tiles in (tried[:1] if small else tried)]
        if not skew and "down" not in shape_name:
            cases.append((case, *gated(small)))
    time_all(journal, cases[:2] if small else cases)
    _gradients(journal, cases[0][0], small)


def _gradients(journal, case, small):
    cores = 2 if small else None
    out_grad = case.rows(case.outputs, 77)
    (weights, (rows, *_), (sizes, *_), (layer, *_)), sizes_np = case.arguments, case.sizes_np[0]
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
            figures = seconds_of(call, (out_grad, weights, sizes, layer), 1)
            return figures | {"error": error, "ok": error < TOLERANCE, "tflops": case.flops / figures["us"] / 1e6}

        def to_weights(tiles=tiles):
            call = jax.jit(functools.partial(pallas_gpu.weights_gradient, tiles=tiles, num_cores=cores))
            out = call(rows, weights, sizes, out_grad)
            errors = []
            for expert in (int(sizes_np.argmax()), int(sizes_np.argmin())):
                own = slice(int(last[expert] - sizes_np[expert]), int(last[expert]))
                pieces = (x[own].astype(jnp.float32) for x in (out_grad, rows))
                expected = jnp.einsum("sf,sd->fd", *pieces, precision="highest")
                errors.append(relative(np.asarray(out[expert], np.float32), np.asarray(expected)))
            figures = seconds_of(call, (rows, weights, sizes, out_grad), 1)
            error = max(errors)
            return figures | {"error": error, "ok": error < TOLERANCE, "tflops": case.flops / figures["us"] / 1e6}

        journal.attempt(f"gradient to rows ours{tuple(tiles)}", to_rows)
        journal.attempt(f"gradient to weights ours{tuple(tiles)}", to_weights)


def peers(journal: Journal, small: bool):
    """The same work by others: at prefill, then at decode."""
    cases = []
    for tokens in (4,) if small else (8192, 64, 8, 1):
        case = Case("olmoe", tokens, 8, 1, 1 if small else 2, small)
        many = tokens > 1000
        blocks = ((128, 128, 64, 6, 8), (128, 192, 64, 4, 1)) if many else ((64, 64, 64, 6, 1),)
        cases += [(case, f"jax mosaic{block}", _mosaic(block)) for block in blocks if not small]
        cases.append((case, "padded", padded.forward))
        if not many:
            cases.append((case, "ragged_dot", ragged_dot.forward))
    journal.attempt(f"{cases[0][0].name} dense product of the rows", timed_dense, cases[0][0])
    time_all(journal, cases)


def timed_dense(case: Case) -> dict:
    """One matrix for all rows: what arithmetic alone would take."""
    call = jax.jit(lambda rows, weights: rows @ weights[0, 0].T)
    figures = seconds_of(call, (case.arguments[1][0], case.weights), 1)
    return figures | {"tflops": case.flops / figures["us"] / 1e6}


def _mosaic(block):
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    keys = "block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n"
    settings = dict(zip(keys, block))

    def forward(rows, weights, sizes, layer):
        matrices = jax.lax.dynamic_index_in_dim(weights, layer, 0, keepdims=False)
        return ragged_dot_mgpu.ragged_dot(rows, matrices, group_sizes=sizes, transpose_rhs=True, **settings)

    return forward


def ragged(journal: Journal, small: bool):
    """`ragged_dot` with many rows, in a process of its own: set XLA_FLAGS to try its fusions."""
    case = Case("olmoe", 4 if small else 8192, 8, 1, 1, small)
    time_all(journal, [(case, "ragged_dot", ragged_dot.forward)])


def trace(journal: Journal, small: bool):
    """Times of the single kernels at decode, by CUPTI."""
    from jax.experimental.mosaic.gpu import profiler

    for tokens in (1, 8, 64)[: 1 if small else 3]:
        case = Case("olmoe", tokens, 8, 1 if small else 4, 1 if small else 4, small)

        def measure(case=case):
            call = case.compile(ours(None, small)[1])
            call(*case.arguments)
            _, kernels = profiler.measure(call, aggregate=False)(*case.arguments)
            return {"kernels_us": [(name[:60], round(1e3 * ms, 2)) for name, ms in kernels]}

        journal.attempt(case.name, measure)


def table(folder: pathlib.Path):
    """A line for each case, and what each reaches of the measured ceilings."""
    results = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
    by_name = {result["name"]: result for result in results}
    bandwidth = max((by_name.get(name, {}).get("tb_per_s", 0) for name in ("copy", "read")), default=0) or float("nan")
    rate = by_name.get("product", {}).get("tflops", float("nan"))
    print("device", by_name.get("device"))
    print(f"ceilings: copy {by_name.get('copy', {}).get('tb_per_s', 0):.2f} TB/s, read", end=" ")
    print(f"{by_name.get('read', {}).get('tb_per_s', 0):.2f} TB/s, product {rate:.0f} TFLOP/s")
    for result in results:
        if "error" in result and isinstance(result["error"], str):
            print(f"{result['stage']:8} {result['name']:52} FAILED {result['error'][:150]}")
        elif "us" in result and "stage" in result and result["stage"] != "ceilings":
            share = f"{result['tb_per_s'] / bandwidth:5.2f} of bandwidth" if "tb_per_s" in result else ""
            verdict = "" if "ok" not in result else ("ok" if result["ok"] else f"WRONG {result['error']:.1e}")
            print(
                f"{result['stage']:8} {result['name']:52} {result['us']:9.1f} us {share}"
                f" {result['tflops']:6.1f} TFLOP/s {verdict}"
            )
        elif "ok" in result:
            verdict = "ok" if result["ok"] else f"WRONG {result['errors']}"
            print(f"{result['stage']:8} {result['name']:52} {verdict}")
        elif "kernels_us" in result:
            print(f"{result['stage']:8} {result['name']} {result['kernels_us'][:6]}")


STAGES = {function.__name__: function for function in (check, ceilings, decode, prefill, peers, ragged, trace)}


def main():
    """Runs one stage, or prints the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=[*STAGES, "table"], required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--small", action="store_true", help="tiny shapes in interpret mode: a rehearsal without a GPU")
    flags = parser.parse_args()
    if flags.stage == "table":
        table(flags.out)
        return
    journal = Journal(flags.out, flags.stage)
    if flags.small:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        with plgpu.force_gpu_interpret_mode():
            STAGES[flags.stage](journal, True)
    else:
        STAGES[flags.stage](journal, False)


if __name__ == "__main__":
    main()
