"""Chooses how tokens reach their experts, by the rows that would travel: once, before anything is compiled."""

import dataclasses

from moe_jax.dispatch.contract import Dispatch


def rows_sent(name: str, tokens: int, k: float, how: Dispatch) -> float:
    """Rows of D numbers that all devices of a group of experts send for one MoE layer, forward.

    Tensor parallelism over as many devices sends as many as `replicated`. The router's choice and counts are small, and
    left out.

    Args:
        name: of the dispatch.
        tokens: of all devices of the group.
        k: slots per token; for `ragged` those that are kept, evenly spread over experts, for others K, static.
        how: the mesh and the capacity; the name in it is not read.

    Raises:
        ValueError: the dispatch is unknown.
    """
    away = how.expert_shards - 1
    if name == "local":
        return 0
    if name in ("replicated", "all_gather"):  # a sum, or a gather and a scattered sum: (n - 1) / n to all n, twice
        return 2 * away * tokens
    if name in ("all_to_all", "ragged"):
        padded = how.capacity if name == "all_to_all" else 1
        return 2 * k * tokens * padded * away / how.expert_shards
    raise ValueError(f"dispatch = {name!r}: expected local, replicated, all_gather, all_to_all or ragged")


def choose(how: Dispatch, tokens: int, k: int, everywhere: bool) -> Dispatch:
    """The dispatch that sends the fewest rows.

    Args:
        how: the mesh; the name in it is replaced.
        tokens: of all devices of a group of experts.
        k: slots per token.
        everywhere: whether every device of the group has all these tokens and needs all results, as in a decode step;
            then a dispatch of split tokens gathers its results at the end. Otherwise tokens are split, and `replicated`
            gathers them first.
    """
    if how.expert_shards == 1:
        return dataclasses.replace(how, name="local")
    names = ["replicated", "all_gather", "all_to_all"]
    if how.mesh.devices.flat[0].platform != "cpu":  # where it is emulated
        names.append("ragged")
    gather = (how.expert_shards - 1) * tokens

    def rows(name: str) -> float:
        return rows_sent(name, tokens, k, how) + gather * (everywhere != (name == "replicated"))

    return dataclasses.replace(how, name=min(names, key=rows))
