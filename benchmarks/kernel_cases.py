"""Cases of `kernels.py`: operands, programs of several calls, checks of the results, and times.

Each timed program makes several calls, each with its own layer, rows and group sizes, so that caches do not help. A
time (`kernel_times.py`) is that of one call. Results are checked against float32 products of some rows.
"""

import concurrent.futures
import functools
import json
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from kernel_table import RESULTS
from kernel_times import rate, time_of

from moe_jax.kernels.expert_ffn.api import swiglu

SLOTS = 8  # of a token, as a model's step has them; those that a policy drops are rows of no expert
TOLERANCE = 1e-2  # relative error in norm, for bfloat16; NaN never passes
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
    "projection": (1, 2048, 2048),
}


class ResultsFile:
    """Appends each result to a file at once."""

    def __init__(self, folder: pathlib.Path, stage: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RESULTS
        self._stage, self._start = stage, time.perf_counter()

    def add(self, name: str, **figures):
        """Writes and prints one result."""
        at_s = round(time.perf_counter() - self._start, 1)
        line = json.dumps({"stage": self._stage, "name": name, "at_s": at_s, **figures})
        print(line, flush=True)
        with open(self._path, "a") as file:
            print(line, file=file)

    def attempt(self, name: str, case, *arguments):
        """Runs a case; an error is recorded as its result."""
        try:
            self.add(name, **case(*arguments))
        except Exception as error:  # a failing case must not stop the others
            self.add(name, error=f"{type(error).__name__}: {str(error)[:300]}")


def random_sizes(rng, num_experts: int, tokens: int, k: int, skew: float = 0.0) -> np.ndarray:
    """Rows per expert if every token chooses k different experts; `skew` is the spread of their log weights.

    A single expert has all k slots of every token.
    """
    if num_experts == 1:
        return np.array([tokens * k], np.int32)
    log_weights = skew * rng.normal(size=num_experts)
    scores = log_weights + rng.gumbel(size=(tokens, num_experts))
    chosen = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return np.bincount(chosen.ravel(), minlength=num_experts).astype(np.int32)


def poison(shape):
    """Fills memory that the next arrays are likely to get with NaN."""
    for _ in range(2):
        jnp.full(shape, jnp.nan, jnp.bfloat16).block_until_ready().delete()


def relative(out, expected) -> float:
    """Relative error in norm; infinite instead of NaN."""
    error = np.linalg.norm(np.float64(out) - expected) / max(np.linalg.norm(expected), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


@functools.cache
def stack(shape_name: str, layers: int, small: bool, transposed: bool):
    """Weights [L, E, F, D], or [L, E, D, F], drawn layer by layer to avoid a float32 copy of the whole stack."""
    shape, depth = matrices_of(shape_name, small, transposed), sizes_of(shape_name, small)[2]
    draw = jax.jit(lambda key: depth**-0.5 * jax.random.normal(key, shape, jnp.bfloat16))
    return jnp.stack([draw(key) for key in jax.random.split(jax.random.key(len(shape_name)), layers)])


def sizes_of(shape_name: str, small: bool):
    """(experts, outputs, depth) of a named shape; tiny if `small`."""
    experts, outputs, depth = SHAPES[shape_name]
    if small:
        return min(experts, 8), 128, 64 if shape_name.endswith("_down") else 128
    return experts, outputs, depth


def matrices_of(shape_name: str, small: bool, transposed: bool):
    """The shape of a layer's weights."""
    num_experts, outputs, depth = sizes_of(shape_name, small)
    return (num_experts, depth, outputs) if transposed else (num_experts, outputs, depth)


class Case:
    """Operands for several calls of one product, or of both products of a layer. Arrays are drawn when first used.

    Args:
        shape_name: of the product, or of the gate and up-projection of a layer.
        tokens: of one call.
        k: experts per token, of `SLOTS` slots; 0: no row belongs to any expert.
        layers: of the stack of weights.
        calls: per program.
        small: use tiny shapes.
        skew: spread of the experts' log weights.
        layer: run both products of a layer, with the activation between them.
        transposed: the weights are drawn as [L, E, D, F], as some peers want them.
    """

    def __init__(self, shape_name, tokens, k, layers, calls, small, skew=0.0, layer=False, transposed=False):
        dropped = f" of {SLOTS}" if k < SLOTS else ""
        self.name = f"{shape_name} {tokens}x{k}{dropped}" + " layer" * layer + (f" skew {skew}" if skew else "")
        self.names = (shape_name, f"{shape_name}_down") if layer else (shape_name,)
        self.layers, self.small, self.transposed = layers, small, transposed
        self.num_experts, self.outputs, self.depth = sizes_of(shape_name, small)
        self.calls, self.slots, self.kept = calls, tokens * SLOTS, tokens * k
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        no_rows = np.zeros(self.num_experts, np.int32)
        self.sizes_np = [random_sizes(rng, self.num_experts, tokens, k, skew) if k else no_rows for _ in range(calls)]

    @property
    def weights(self):
        """One stack [L, E, F, D] or two, shared by all cases of that shape."""
        return tuple(stack(name, self.layers, self.small, self.transposed) for name in self.names)

    def rows(self, width: int, number: int):
        """Random rows, bfloat16 [S, width]."""
        return jax.random.normal(jax.random.key(1000 * self.slots + number), (self.slots, width), jnp.bfloat16)

    @functools.cached_property
    def arguments(self):
        """The arguments of the compiled program."""
        rows = [self.rows(self.depth, number) for number in range(self.calls)]
        layers = [jnp.int32(i % self.layers) for i in range(self.calls)]
        return self.weights, rows, [jnp.asarray(sizes) for sizes in self.sizes_np], layers

    def compile(self, forward):
        """Compiles all calls of forward(rows, *weights, sizes, layer) into one program; forward is traced once."""
        inner = jax.jit(forward)

        def run(weights, rows, sizes, layers):
            return [inner(r, *weights, s, layer) for r, s, layer in zip(rows, sizes, layers)]

        shape = jax.ShapeDtypeStruct
        matrices = (matrices_of(name, self.small, self.transposed) for name in self.names)
        weights = tuple(shape((self.layers, *one), jnp.bfloat16) for one in matrices)
        rows = [shape((self.slots, self.depth), jnp.bfloat16)] * self.calls
        sizes = [shape((self.num_experts,), jnp.int32)] * self.calls
        return jax.jit(run).lower(weights, rows, sizes, [shape((), jnp.int32)] * self.calls).compile()

    @property
    def bytes_moved(self) -> float:
        """Least bytes per call: weights of each chosen expert once, kept rows in and out of each product once."""
        experts = np.mean([(sizes > 0).sum() for sizes in self.sizes_np])
        total = 0.0
        for _, outputs, depth in (sizes_of(name, self.small) for name in self.names):
            total += experts * outputs * depth + self.kept * depth
        hidden = self.kept * (self.outputs // 2 if len(self.names) == 2 else self.outputs)
        return 2 * (total + hidden + (self.kept * self.depth if len(self.names) == 2 else 0))

    @property
    def flops(self) -> float:
        """Floating-point operations of one call."""
        shapes = [sizes_of(name, self.small) for name in self.names]
        return 2.0 * self.kept * sum(outputs * depth for _, outputs, depth in shapes)

    def error(self, outs) -> float:
        """The largest relative error of any call, over a sample of its rows."""
        errors = []
        for out, rows, sizes, layer in zip(outs, *self.arguments[1:]):
            if not bool(jnp.isfinite(out.astype(jnp.float32)).all()):
                return float("inf")
            sizes = np.asarray(sizes)
            held = int(sizes.sum())
            if not held:
                errors.append(float(jnp.abs(out).max()))
                continue
            chosen = np.resize(np.unique(np.linspace(0, held - 1, 16, dtype=int)), 16)
            experts = jnp.asarray(np.searchsorted(np.cumsum(sizes), chosen, side="right"))
            expected = _products(rows[jnp.asarray(chosen)], self.weights[0], layer, experts, self.transposed)
            if len(self.weights) == 2 or out.shape[1] < self.outputs:
                expected = swiglu(expected)
            if len(self.weights) == 2:
                hidden = expected.astype(jnp.bfloat16)
                expected = _products(hidden, self.weights[1], layer, experts, self.transposed)
            errors.append(relative(np.asarray(out[jnp.asarray(chosen)], np.float32), np.asarray(expected)))
        return max(errors)


@functools.partial(jax.jit, static_argnames="transposed")
def _products(rows, weights, layer, experts, transposed):
    def product(_, at):
        row, expert = at
        matrix = weights[layer, expert].astype(jnp.float32)
        matrix = matrix.T if transposed else matrix
        return None, jnp.dot(matrix, row.astype(jnp.float32), precision="highest")

    return jax.lax.scan(product, None, (rows, experts))[1]


def time_all(results: ResultsFile, cases: list):
    """Compiles all (case, name, forward) in parallel, then checks and times them one by one."""

    def compiled(case, forward):
        start = time.perf_counter()
        return case.compile(forward), round(time.perf_counter() - start, 1)

    small = cases[0][0].small  # interpret mode must stay on one thread
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
            if last.names[0] != case.names[0]:
                stack.cache_clear()
        last = case
        results.attempt(f"{case.name} {name}", timed, case, program)
    pool.shutdown()


def timed(case: Case, program) -> dict:
    """Checks and times one program."""
    call, compile_s = program()
    poison((case.slots, case.outputs))
    error = case.error(call(*case.arguments))
    figures = time_of(call, case.arguments, case.calls)
    return {
        "error": error,
        "ok": error < TOLERANCE,
        **figures,
        "tb_per_s": rate(case.bytes_moved, figures) / 1e6,
        "tflops": rate(case.flops, figures) / 1e6,
        "compile_s": compile_s,
    }
