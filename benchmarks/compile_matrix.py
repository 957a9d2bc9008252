"""Compiles the kernels for chips that are not there, at the shapes of four models, and writes what came of it.

    python benchmarks/compile_matrix.py --chips v5e v5p v6e tpu7x
    python benchmarks/compile_matrix.py --chips h100

The first needs `requirements-aot.txt` and takes about half an hour on two cores; the second needs
`requirements-aot-gpu.txt`, and takes five minutes.

A line of JSON per case in OUT/CHIP.jsonl: processor seconds, the memory on the chip that a kernel takes, temporaries in
device memory, date and versions. What stands there from the same compiler and the same kernels is not compiled again.
The exit status is 1 if a case fails. `python -m pytest -m aot tests/aot` has the same cases.
"""

import argparse
import collections
import datetime
import functools
import hashlib
import json
import math
import os
import pathlib
import statistics
import sys
from typing import NamedTuple

import compilers
import jax
import jax.numpy as jnp
import traffic
from compilers import shape

from moe_jax import files
from moe_jax.kernels.causal_attention.api import causal_attention
from moe_jax.kernels.grouped_matmul import pallas_gpu, pallas_tpu, pallas_tpu_tiles
from moe_jax.study import topologies

ROOT = pathlib.Path(__file__).parents[1]
CHIPS = (*compilers.TPUS, "h100")
TOKENS = (1, 8, 64, 512, 2048, 8192)
LAYERS = {"olmoe_1b_7b": 16, "deepseek_v2_lite": 16, "qwen3_30b_a3b": 16, "deepseek_v3": 2}  # as many as a chip holds
PRODUCTS = tuple(traffic.products(traffic.LayerShape(1, 1, 1, 1), 1))
MOST_TEMPORARIES = 0.01  # of the bytes of the experts

# query heads, key heads, channels of keys, channels of values
HEADS = {"olmoe_1b_7b": (16, 16, 128, 128), "qwen3_30b_a3b": (32, 4, 128, 128), "deepseek_v2_lite": (16, 16, 192, 128)}
LENGTHS = {  # positions of queries and of keys
    "2048": (2048, 2048),
    "8192": (8192, 8192),
    "2048 of 8192": (2048, 8192),
    "700": (700, 700),
}
ATTENTION = ("attention", "attention in segments")  # value and gradients


class CompileCase(NamedTuple):
    """One program."""

    chip: str
    model: str
    size: int | str  # tokens, or for attention, one of LENGTHS
    work: str  # one of PRODUCTS, or of ATTENTION


class Compiled(NamedTuple):
    """What the compiler says of a case."""

    cpu_seconds: float  # of all threads; less is waited for on several cores, and more on a busy machine
    kernels: tuple[str, ...]
    on_chip_bytes: int  # of the kernel that takes most: vector memory of a TPU, shared memory of a GPU's block
    temporary_bytes: int  # in device memory
    most_on_chip_bytes: int
    most_temporary_bytes: float

    @property
    def problem(self) -> str:
        """What is wrong; "" if nothing is."""
        if not self.kernels:
            return "no kernel in the program"
        if self.on_chip_bytes > self.most_on_chip_bytes:
            return f"{self.on_chip_bytes} bytes on the chip: expected at most {self.most_on_chip_bytes}"
        if self.temporary_bytes > self.most_temporary_bytes:
            return f"{self.temporary_bytes} bytes of temporaries: expected at most {self.most_temporary_bytes:.0f}"
        return ""


def cases(chip: str) -> list[CompileCase]:
    """All cases of a chip. Attention on a GPU is cuDNN's, which plans only where there is a device."""
    products = [CompileCase(chip, model, tokens, work) for model in LAYERS for tokens in TOKENS for work in PRODUCTS]
    attention = [CompileCase(chip, model, size, work) for model in HEADS for size in LENGTHS for work in ATTENTION]
    return products if chip == "h100" else products + attention


def compile_case(case: CompileCase) -> Compiled:
    """Compiles one case; what a compiler raises is passed on."""
    return (_compile_attention if case.work in ATTENTION else _compile_product)(case)


def _compile_product(case: CompileCase) -> Compiled:
    experts = traffic.experts_of(case.model)
    product = traffic.products(experts, case.size * experts.k)[case.work]
    layers = 1 if product.to_weights else LAYERS[case.model]
    function, arguments = _product(case.chip, product, experts.num_experts, layers)
    most = MOST_TEMPORARIES * 2 * layers * experts.num_experts * math.prod(product.matrices)
    if case.chip == "h100" and product.to_weights:  # copies of each expert's first and last block of rows
        rows = experts.num_experts * 2 * pallas_gpu.MANY.depth + product.rows[0]
        most = 2 * rows * (product.rows[1] + product.other_rows[1]) + 2**20
    return _outcome(case.chip, function, arguments, most)


def _product(chip: str, product: traffic.Product, num_experts: int, layers: int):
    """A function and its abstract arguments."""
    rows, other_rows = shape(*product.rows), shape(*product.other_rows)
    sizes, gated = shape(num_experts, dtype=jnp.int32), product.matrices[0] == 2
    weights = shape(layers, num_experts, *(product.matrices if gated else product.matrices[1:]))
    kernels = pallas_gpu if chip == "h100" else pallas_tpu
    if product.to_weights:
        function = kernels.weights_gradient
        arguments = (rows, weights, sizes, other_rows) if chip == "h100" else (rows, sizes, other_rows)
    else:
        function = kernels.rows_gradient if product.transposed else kernels.gated if gated else kernels.forward
        arguments = rows, weights, sizes, shape(dtype=jnp.int32)
    if chip != "h100":
        function = functools.partial(function, num_cores=traffic.CHIPS[chip].num_cores)
    return function, arguments


def _compile_attention(case: CompileCase) -> Compiled:
    heads, kv_heads, channels, value_channels = HEADS[case.model]
    queries, keys = LENGTHS[case.size]

    def with_gradient(query, key, value, segments_BM, start_B, grad):
        def mix(*inputs):
            places = segments_BM if case.work == "attention in segments" else None, start_B
            return causal_attention(*inputs, *places, 0.09, "splash", prefixes=False)

        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(grad)

    operands = (
        shape(2, queries, heads, channels),
        shape(2, keys, kv_heads, channels),
        shape(2, keys, kv_heads, value_channels),
        shape(2, keys, dtype=jnp.int32),
        shape(2, dtype=jnp.int32),
        shape(2, queries, heads, value_channels),
    )
    score_bytes = 4 * 2 * heads * queries * keys
    return _outcome(case.chip, with_gradient, operands, score_bytes / 2 if queries >= 2048 else math.inf)


def _outcome(chip, function, arguments, most_temporary_bytes) -> Compiled:
    compilers.device(chip)
    begin = sum(os.times()[:4])  # with children, which assemble code for GPUs
    program = compilers.compiled(chip, function, *arguments)
    cpu_seconds = sum(os.times()[:4]) - begin
    if chip == "h100":
        kernels = ("mosaic_gpu",) * program.as_text().count('custom_call_target="mosaic_gpu')
        on_chip, most = compilers.shared_bytes(jax.make_jaxpr(function)(*arguments).jaxpr), compilers.SHARED_BYTES
    else:
        kernels, on_chip = zip(*compilers.mosaic_kernels(program))
        most = pallas_tpu_tiles.VMEM_LIMIT_BYTES
    temporaries = program.memory_analysis().temp_size_in_bytes
    return Compiled(round(cpu_seconds, 2), kernels, max(on_chip), temporaries, most, most_temporary_bytes)


def attempt(case: CompileCase) -> dict:
    """The figures of a case, or the error; an outcome beyond its limits is an error too."""
    try:
        outcome = compile_case(case)
    except Exception as error:  # a failing case must not stop the others
        return {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    names = "cpu_seconds", "on_chip_bytes", "temporary_bytes"
    return {"ok": not outcome.problem, **({"error": outcome.problem} if outcome.problem else {})} | {
        name: getattr(outcome, name) for name in names
    }


def made_by(chip: str) -> dict[str, str]:
    """The compiler's versions, and a hash of the kernels' sources."""
    folder = ROOT / "moe_jax" / "kernels"
    names = ("grouped_matmul/pallas_gpu*", "grouped_matmul/stacks*")
    if chip != "h100":
        names = ("grouped_matmul/pallas_tpu*", "grouped_matmul/stacks*", "causal_attention/splash*")
    sources = b"".join(path.read_bytes() for name in names for path in sorted(folder.glob(f"{name}.py")))
    return topologies.versions(chip) | {"kernels": hashlib.sha256(sources).hexdigest()[:8]}


def read(path: pathlib.Path) -> dict[CompileCase, dict]:
    """The results in a file; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {CompileCase(*(result["case"][name] for name in CompileCase._fields)): result for result in results}


def compile_all(chip: str, path: pathlib.Path, maker: dict[str, str]) -> bool:
    """Compiles what `path` lacks, writes each result at once, and says whether all is well."""
    results, chosen = read(path), cases(chip)
    for number, case in enumerate(chosen):
        known = results.get(case, {})
        if known.get("ok") and known["made_by"] == maker:
            continue
        dated = {"case": case._asdict(), "date": datetime.date.today().isoformat(), "made_by": maker}
        figures = attempt(case)
        results[case] = dated | figures
        lines = [json.dumps(results[one]) + "\n" for one in chosen if one in results]
        files.write_atomically(path, "".join(lines))
        print(f"{number + 1}/{len(chosen)}", *case, *(f"{name} {value}" for name, value in figures.items()), flush=True)
    return all(results[case]["ok"] for case in chosen)


def summary(results: dict[CompileCase, dict]) -> str:
    """A line per chip and model: how many compiled, and the most that any of them takes."""
    groups = collections.defaultdict(list)
    for case, result in results.items():
        groups[case.chip, case.model, "attention" if case.work in ATTENTION else "experts"].append(result)
    lines = [f"{'':40}{'compiled':>10}{'median s':>10}{'most s':>8}{'most KiB on the chip':>22}"]
    for group, members in groups.items():
        right = [member for member in members if member["ok"]] or [{"cpu_seconds": math.nan, "on_chip_bytes": math.nan}]
        seconds = [member["cpu_seconds"] for member in right]
        lines.append(
            f"{' '.join(group):40}{sum(member['ok'] for member in members):>5} of{len(members):>4}"
            f"{statistics.median(seconds):>10.1f}{max(seconds):>8.1f}"
            f"{max(member['on_chip_bytes'] for member in right) / 1024:>20.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Compiles all cases of the chips that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(compilers.TPUS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/aot"))
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    paths = {chip: flags.out / f"{chip}.jsonl" for chip in flags.chips}
    try:
        for chip in flags.chips:
            compilers.device(chip)
    except topologies.NoCompilerError as error:
        parser.error(str(error))
    makers = {chip: made_by(chip) for chip in flags.chips}  # before anybody edits the sources
    fine = [compile_all(chip, path, makers[chip]) for chip, path in paths.items()]
    for path in paths.values():
        print(summary(read(path)))
    sys.exit(not all(fine))


if __name__ == "__main__":
    main()
