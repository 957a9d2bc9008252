"""Parses the text of a policy, as written in configs and on the command line."""

import difflib
from collections.abc import Sequence

from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies import registry
from moe_jax.routing.policies.kind import Kind
from moe_jax.routing.policies.policy import Policy
from moe_jax.routing.policies.schedule import ModelOwn


def parse(spec: str, calibration: Calibration | None = None) -> Policy:
    """Parses parts joined by `+`, such as `"topk:4"`, `"topk:6+ratio:0.3,min=2"` or `"opportunistic:3"`.

    A `PerLayer` field of a kind takes one number, or one for each MoE layer: `"ratio:0.3/0.3/0.1"`. The order of the
    parts does not matter; without a part that sets k, the model's own k is used.

    Args:
        spec: the text.
        calibration: the model's calibration; `median` and `reroute` need it.

    Raises:
        ValueError: the spec is not valid. The message has the spec, what was expected, and the nearest kind.
    """
    try:
        parts = [_part(text.strip()) for text in spec.strip().split("+")]
        _require_different(parts)
    except ValueError as error:
        raise ValueError(f"policy {spec!r}: {error}") from error
    return Policy(tuple(sorted(parts, key=lambda part: registry.KINDS.index(type(part)))), calibration)


def _part(text: str) -> Kind:
    name, _, argument = text.partition(":")
    kinds = {kind.name: kind for kind in registry.KINDS}
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f'; did you mean "{kinds[near[0]].form}"?' if near else ""
        expected = ", ".join(f'"{kind.form}"' for kind in kinds.values())
        raise ValueError(f"expected one of the forms {expected}, or several joined by +{hint}")
    try:
        return kinds[name].parsed(argument.split(",") if argument else [])
    except ValueError as error:
        raise ValueError(f'{error}, as in "{kinds[name].form}"') from error


def _require_different(parts: Sequence[Kind]) -> None:
    """Refuses parts that set the same columns."""
    for part in parts:
        rivals = [other.name for other in parts if {*other.sets} & {*part.sets}]
        if len(rivals) > 1:
            raise ValueError(f"{' and '.join(rivals)}: expected one of them")


MODEL_OWN = Policy((ModelOwn(),))  # what the model was trained with
