"""Loads a model in one of two joined processes, prints how many bytes of its file it touched, and saves it together.

    python -m tests.mesh.one_of_two COORDINATOR INDEX MESH FOLDER OUT

MESH is JSON of `MeshConfig`. The kernel counts the touched pages of a mapped file, whatever read them.
"""

import json
import pathlib
import sys

import jax

from moe_jax import checkpoint, files
from moe_jax.checkpoint import filling
from moe_jax.config.mesh import MeshConfig
from moe_jax.model.sharding import layout_of, sharding_of


def touched_bytes(folder):
    """Bytes of the pages of a folder's files that this process has read through mappings that still exist."""
    total, inside = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        name, *fields = line.split()
        if not name.endswith(":"):
            inside = fields[-1].startswith(f"{folder}/")
        elif inside and name == "Rss:":
            total += int(fields[0]) * 1024
    return total


def shard_bytes(params):
    """Bytes of the distinct shards that the devices of this process hold."""
    total = 0
    for array in jax.tree.leaves(params):
        shards = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
        total += sum(shards.values())
    return total


def main(coordinator, index, mesh, folder, out):
    """Prints the bytes of shards, touched, and of the whole model; writes the model to `out`."""
    jax.distributed.initialize(coordinator, 2, int(index))
    if index != "0":
        files.leave_to_first()
    map_file, kept = filling._mapped, []

    def map_and_keep(*arguments, **options):
        kept.append(map_file(*arguments, **options))
        return kept[-1]

    filling._mapped = map_and_keep
    mesh = {name: tuple(one) if isinstance(one, list) else one for name, one in json.loads(mesh).items()}
    opened = checkpoint.open(folder)
    params = opened.load("auto", sharding_of(layout_of(MeshConfig(**mesh), opened.architecture)))
    whole_bytes = sum(array.nbytes for array in jax.tree.leaves(params))
    print(json.dumps([shard_bytes(params), touched_bytes(opened.folder), whole_bytes]), file=sys.stderr)
    opened.save(out, params)


if __name__ == "__main__":
    main(*sys.argv[1:])
