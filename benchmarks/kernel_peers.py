"""The stages `peers` and `ragged` of `kernels.py`: other implementations on the same work, at prefill and at decode.

Weights lie as each peer wants them before the time is taken. tokamax is optional (`pip install tokamax`).
"""

import importlib.util

import jax
import jax.numpy as jnp
from kernel_cases import Case, ResultsFile, time_all
from kernel_times import rate, time_of

from moe_jax.kernels.grouped_matmul import padded, ragged_dot

MANY = 8192  # tokens of a prefill


def peers(results: ResultsFile, small: bool):
    """tokamax, JAX's own Mosaic kernel, `padded` and `ragged_dot`; and a dense product of the same rows."""
    cases = []
    for tokens in (4,) if small else (MANY, 64, 8, 1):
        case = _case(tokens, small)
        blocks = ((128, 128, 64, 6, 8), (128, 192, 64, 4, 1)) if tokens == MANY else ((64, 64, 64, 6, 1),)
        cases += [(case, f"jax mosaic{block}", mosaic(block)) for block in blocks if not small]
        cases.append((case, "padded", padded.forward))
        if tokens != MANY:
            cases.append((case, "ragged_dot", ragged_dot.forward))
    results.attempt(f"{cases[0][0].name} dense product of the rows", timed_dense, cases[0][0])
    time_all(results, cases)
    if importlib.util.find_spec("tokamax") is None:
        results.add("tokamax", missing="not installed: pip install tokamax")
        return
    name = "xla" if small else "mosaic"
    transposed = [_case(tokens, small, transposed=True) for tokens in ((4,) if small else (MANY, 64, 8, 1))]
    time_all(results, [(case, f"tokamax {name}", tokamax(name)) for case in transposed])


def ragged(results: ResultsFile, small: bool):
    """`ragged_dot` alone. Its own stage, so that XLA_FLAGS can enable the fusion of it, which asks for cuDNN."""
    cases = [_case(tokens, small) for tokens in ((4,) if small else (MANY, 64, 8, 1))]
    time_all(results, [(case, "ragged_dot, XLA's fusion", ragged_dot.forward) for case in cases])


def _case(tokens: int, small: bool, transposed: bool = False) -> Case:
    """One layer's weights: then no implementation copies the layer out of a stack."""
    calls = 1 if small else 2 if tokens == MANY else 8
    return Case("olmoe", tokens, 8, 1, calls, small, transposed=transposed)


def timed_dense(case: Case) -> dict:
    """Times one matrix for all rows: the cost of the arithmetic alone."""
    call = jax.jit(lambda rows, weights: rows @ weights[0, 0].T)
    figures = time_of(call, (case.arguments[1][0], *case.weights), 1)
    return figures | {"tflops": rate(case.flops, figures) / 1e6}


def mosaic(block: tuple[int, ...]):
    """The forward of JAX's own kernel for a Hopper GPU with given blocks."""
    keys = "block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n"
    settings = dict(zip(keys, block))

    def forward(rows, weights, sizes, layer):
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

        matrices = _of_layer(weights, layer)
        return ragged_dot_mgpu.ragged_dot(rows, matrices, group_sizes=sizes, transpose_rhs=True, **settings)

    return forward


def tokamax(implementation: str):
    """The forward of tokamax, for weights [L, E, D, F]."""

    def forward(rows, weights, sizes, layer):
        import tokamax

        matrices = _of_layer(weights, layer)
        settings = {"preferred_element_type": jnp.bfloat16, "implementation": implementation}
        return tokamax.ragged_dot(rows, matrices, sizes, **settings)

    return forward


def _of_layer(weights, layer):
    return jax.lax.dynamic_index_in_dim(weights, layer, 0, keepdims=False)
