"""The text of a policy, as configs and the command line write it, to a policy."""

import dataclasses
import difflib

from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.base import Policy
from moe_jax.routing.policies.batch_aware import Budget, Opportunistic, Reroute
from moe_jax.routing.policies.capacity import Capacity
from moe_jax.routing.policies.part import Part, PerLayer
from moe_jax.routing.policies.schedule import Layers, ModelOwn, Schedule, TopK
from moe_jax.routing.policies.threshold import Mass, Median, Ratio, Renormalize

# In the order in which they act.
KINDS = {
    part.kind: part
    for part in (
        *(ModelOwn, TopK, Schedule, Layers),
        *(Ratio, Median, Mass),
        *(Opportunistic, Budget, Reroute, Capacity),
        Renormalize,
    )
}
EXCLUSIVE = (("model", "topk", "schedule", "layers"), ("ratio", "median"))


def parse(spec: str, calibration: Calibration | None = None) -> Policy:
    """Parses parts joined by `+`, such as `"topk:4"`, `"topk:6+ratio:0.3,min=2"` or `"opportunistic:3"`.

    Numbers may be one for each MoE layer where a part's class says `PerLayer`: `"ratio:0.3/0.3/0.1"`. The order of the
    parts does not matter; without one that sets k, the model's own k comes in.

    Args:
        spec: the text.
        calibration: of the model, which `median` and `reroute` want.

    Raises:
        ValueError: naming the spec, what was wanted, and the nearest kind.
    """
    try:
        parts = [_part(text.strip()) for text in spec.strip().split("+")]
        kinds = [part.kind for part in parts]
        for rivals in (*EXCLUSIVE, *((kind,) for kind in KINDS)):
            if len(found := [kind for kind in kinds if kind in rivals]) > 1:
                raise ValueError(f"{' and '.join(found)}: wanted one of them")
    except ValueError as error:
        raise ValueError(f"policy.spec = {spec!r}: {error}") from error
    return Policy(tuple(sorted(parts, key=lambda part: list(KINDS).index(part.kind))), calibration)


def _part(text: str) -> Part:
    kind, _, argument = text.partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f'; did you mean "{KINDS[near[0]].form}"?' if near else ""
        wanted = ", ".join(f'"{one.form}"' for one in KINDS.values())
        raise ValueError(f"wanted one of the forms {wanted}, or several joined by +{hint}")
    try:
        return KINDS[kind](**_fields(KINDS[kind], argument.split(",") if argument else []))
    except ValueError as error:
        raise ValueError(f'{error}, as in "{KINDS[kind].form}"') from error


def _fields(part: type[Part], words: list[str]) -> dict:
    """The values of a part's fields: those without a default by their place, the others by their names."""
    fields = dataclasses.fields(part)
    if part is Layers:
        return {"k_L": tuple(_value(int, word) for word in words) or _value(int, "")}
    placed = [field for field in fields if field.default is dataclasses.MISSING]
    named = {field.name: field for field in fields if field not in placed}
    values = {}
    for number, word in enumerate(words):
        name, equals, text = word.partition("=")
        if number < len(placed):
            field, text = placed[number], word
        elif equals and name.strip() in named:
            field = named[name.strip()]
        else:
            raise ValueError(f"{word!r} is not known here; wanted {_described(placed, named)}")
        if field.name in values:
            raise ValueError(f"{field.name} is given twice")
        values[field.name] = _value(field.type, text.strip())
    if len(words) < len(placed):
        raise ValueError(f"wanted {_described(placed, named)}")
    return values


def _described(placed, named) -> str:
    words = [field.name for field in placed] + [f"{name}=..." for name in named]
    return ", ".join(words) if words else "nothing behind its name"


def _value(kind: type, text: str):
    try:
        if kind == PerLayer:
            return tuple(float(number) for number in text.split("/"))
        return kind(text)
    except ValueError:
        wanted = {int: "whole numbers of at least 1", float: "a number"}.get(kind, "numbers")
        raise ValueError(f"{text!r}: wanted {wanted}") from None


MODEL_OWN = Policy((ModelOwn(),))  # what the model was trained with
