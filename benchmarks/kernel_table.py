"""Prints the results of `kernels.py`: a line per case. First the device's own time, of which rates and shares are.

python benchmarks/kernel_table.py out/kernels
"""

import json
import pathlib
import sys

RESULTS = "kernels.jsonl"


def table(folder: pathlib.Path):
    """Prints a line per case, with its share of the measured bandwidth."""
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
        elif "missing" in result:
            print(f"{result['stage']:8} {result['name']:52} {result['missing']}")
        elif "us" in result and result["stage"] != "ceilings":
            share = f"{result['tb_per_s'] / bandwidth:5.2f} of bandwidth" if "tb_per_s" in result else ""
            verdict = "" if "ok" not in result else ("ok" if result["ok"] else f"WRONG {result['error']:.1e}")
            device = f"{result['device_us']:9.1f} us" if "device_us" in result else f"{'':12}"
            print(
                f"{result['stage']:8} {result['name']:52} {device} {result['us']:9.1f} us by the clock {share}"
                f" {result['tflops']:6.1f} TFLOP/s {verdict}"
            )
        elif "ok" in result:
            verdict = "ok" if result["ok"] else f"WRONG {result['errors']}"
            print(f"{result['stage']:8} {result['name']:52} {verdict}")


if __name__ == "__main__":
    table(pathlib.Path(sys.argv[1]))
