"""What a step takes on devices that are not there, as figures and rows of result.json, and as tables."""

from collections import Counter
from typing import Any

from moe_jax.report.figures import Row, markdown
from moe_jax.study.compile import CompiledStep, CompileResult, Counted
from moe_jax.study.meshes import CountedMesh

OTHERS = 3  # meshes to show beside the best


def figures(outcome: CompileResult) -> dict[str, dict[str, Any]]:
    """Memory, by the compiler, and the least work and time of a device with the model's own number of experts."""
    chip, best, compiled = outcome.task.topology.chip, outcome.best, outcome.compiled
    found = {
        "memory_bytes": {"value": chip.memory_bytes, "unit": "bytes"},
        "held_bytes": {"value": best.held_bytes, "unit": "bytes"},
        "fits": {"value": int(outcome.fits), "unit": "1"},
        **_share(outcome, Counted(best.load, best.share)),
    }
    if isinstance(compiled, CompiledStep):
        found |= {
            name: {"value": getattr(compiled, name), "unit": "bytes"}
            for name in ("weight_bytes", "cache_bytes", "other_bytes", "temporary_bytes", "needed_bytes")
        }
        found["compiled_sent_bytes"] = {"value": compiled.sent_bytes, "unit": "bytes"}
        if outcome.task.topology.platform == "gpu":
            found["triton_products"] = {"value": int(compiled.triton), "unit": "1"}
    return found


def rows(outcome: CompileResult) -> list[Row]:
    """A row for each number of active experts and of rows."""
    return [
        {"policy": f"topk:{one.load.k}", "rows": one.load.rows, "figures": _share(outcome, one)}
        for one in outcome.counted
    ]


def _share(outcome: CompileResult, one: Counted) -> dict[str, dict[str, Any]]:
    chip, share, tokens = outcome.task.topology.chip, one.share, outcome.task.tokens(one.load)
    return {
        "bytes": {"value": share.work.bytes, "unit": "bytes"},
        "flops": {"value": share.work.flops, "unit": "flops"},
        "sent_bytes": {"value": share.sent_bytes, "unit": "bytes"},
        "collectives": {"value": share.collectives, "unit": "1"},
        "roofline_ms": {"value": 1e3 * share.floor_s(chip), "unit": "ms"},
        "with_starts_ms": {"value": 1e3 * share.estimate_s(chip), "unit": "ms"},
        "tokens_per_s": {"value": tokens / share.floor_s(chip), "unit": "tokens/s"},
    }


def table(outcome: CompileResult) -> str:
    """For people: the verdict, memory, what is sent, and times by active experts and rows."""
    task, best = outcome.task, outcome.best
    settings, chip = task.config.compile, task.topology.chip
    load = best.load
    size = f"{settings.positions} positions" if settings.phase == "decode" else f"{load.new} tokens"
    parts = [
        f"{settings.phase} of {load.rows} rows of {size}, {task.dtype}, on {len(task.topology.devices)} devices of "
        f"{task.topology.name}\n"
        f"mesh {_mesh(best)}; " + ", ".join(f"{op} {name}" for op, name in best.execution.implementations.items()),
        _verdict(outcome),
        _sent(outcome),
        "Least milliseconds of a step / tokens per second of all devices, by count; the one program serves every k:",
        _times(outcome),
        f"Peaks of a device: {chip.bytes_per_s / 1e9:.0f} GB/s, {chip.flops_per_s / 1e12:.3g} TFLOP/s, links "
        f"{chip.link_bytes_per_s / 1e9:.0f} GB/s ({chip.source}).",
    ]
    if len(outcome.candidates) > 1:
        parts.append(_others(outcome))
    return "\n\n".join(part for part in parts if part)


def _mesh(one: CountedMesh) -> str:
    mesh = one.mesh
    sizes = " x ".join(f"{name} {getattr(mesh, name)}" for name in ("data", "expert", "tensor"))
    return f"{sizes}, experts over {' and '.join(mesh.expert_axes)}"


def _verdict(outcome: CompileResult) -> str:
    chip, compiled = outcome.task.topology.chip, outcome.compiled
    verdict = "fits" if outcome.fits else "DOES NOT FIT"
    if not isinstance(compiled, CompiledStep):
        held, least = outcome.best.held_bytes, outcome.task.least_devices()
        count = len(outcome.task.topology.devices)
        where = f"{least} devices would hold them" if least > count else "fewer rows or positions may fit"
        if not least:
            where = "no power of two of devices would hold them"
        return (
            f"{verdict}: {_held(outcome)} take {held / 1e9:.2f} GB of the {chip.memory_bytes / 1e9:.2f} GB of each "
            f"device ({compiled}); {where}"
        )
    sizes = {
        "weights": compiled.weight_bytes,
        "optimizer" if outcome.task.trains else "cache": compiled.cache_bytes,
        "temporaries": compiled.temporary_bytes,
        "other": compiled.other_bytes,
    }
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    kernels = ", ".join(f"{count} {name}" for name, count in compiled.kernels.items()) or "none"
    if outcome.task.topology.platform == "gpu" and not compiled.triton:
        kernels += "; products by cuBLAS alone, where a run may have Triton"
    return (
        f"{verdict}: {listed}, in all {compiled.needed_bytes / 1e9:.2f} of {chip.memory_bytes / 1e9:.2f} GB of each "
        f"device; compiled in {compiled.seconds:.0f} s, kernel calls: {kernels}"
    )


def _held(outcome: CompileResult) -> str:
    return "weights, gradients and moments" if outcome.task.trains else "weights and cache"


def _sent(outcome: CompileResult) -> str:
    if not isinstance(outcome.compiled, CompiledStep) or not outcome.compiled.collectives:
        return ""
    found = Counter()
    for one in outcome.compiled.collectives:
        found[one._replace(times=0)] += one.times
    lines = [
        [one.name, str(one.devices), str(times), f"{one.array_bytes / 1e6:.3f}", f"{times * one.sent_bytes / 1e6:.2f}"]
        for one, times in sorted(found.items(), key=lambda pair: -pair[1] * pair[0].sent_bytes)
        if times * one.sent_bytes >= 0.01 * outcome.compiled.sent_bytes
    ]
    head = ["collective", "devices", "times", "MB of an array", "MB sent in all"]
    total = f"Sent by a device: {outcome.compiled.sent_bytes / 1e6:.1f} MB in the program, "
    total += f"{outcome.best.share.sent_bytes / 1e6:.1f} MB by count."
    return f"{total}\n\n{markdown(head, lines)}"


def _times(outcome: CompileResult) -> str:
    chip = outcome.task.topology.chip
    found = {(one.load.rows, one.load.k): one for one in outcome.counted}
    slots, batches = outcome.task.slots, sorted({one.load.rows for one in outcome.counted})

    def cell(one: Counted) -> str:
        seconds = one.share.floor_s(chip)
        return f"{1e3 * seconds:.3g} / {outcome.task.tokens(one.load) / seconds:.3g}"

    lines = [[f"`topk:{k}`", *(cell(found[rows, k]) for rows in batches)] for k in slots]
    return markdown(["rows", *map(str, batches)], lines)


def _others(outcome: CompileResult) -> str:
    shown = outcome.candidates[: OTHERS + 1]
    lines = [
        [
            _mesh(one),
            f"{one.held_bytes / 1e9:.2f}",
            f"{1e3 * one.share.floor_s(outcome.task.topology.chip):.3f}",
            f"{1e3 * one.seconds:.3f}",
        ]
        for one in shown
    ]
    head = ["mesh", f"GB of {_held(outcome)}", "least ms", "with the starts of collectives"]
    return f"The best of {len(outcome.candidates)} meshes, by count:\n\n" + markdown(head, lines)
