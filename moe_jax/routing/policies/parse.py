"""The text of a policy, as configs and the command line write it, to a policy."""

import difflib

from moe_jax.routing.policies.base import Policy
from moe_jax.routing.policies.schedule import Layers, ModelOwn, TopK

FORMS = {"model": "model", "topk": "topk:4", "layers": "layers:8,8,4"}


def parse(spec: str) -> Policy:
    """Parses `"model"`, `"topk:4"` or `"layers:8,8,4"`.

    Raises:
        ValueError: naming the spec, what was wanted, and the nearest kind.
    """
    kind, _, argument = spec.strip().partition(":")
    if kind not in FORMS:
        near = difflib.get_close_matches(kind, FORMS, n=1)
        hint = f'; did you mean "{FORMS[near[0]]}"?' if near else ""
        wanted = ", ".join(f'"{form}"' for form in FORMS.values())
        raise ValueError(f"policy.spec = {spec!r}: wanted one of the forms {wanted}{hint}")
    if kind == "model" and not argument:
        return ModelOwn()
    try:
        numbers = tuple(int(part) for part in argument.split(","))
    except ValueError:
        numbers = ()
    wrong_count = not numbers or (kind == "topk" and len(numbers) != 1) or kind == "model"
    if wrong_count or min(numbers) < 1:
        raise ValueError(f'policy.spec = {spec!r}: wanted whole numbers of at least 1, as in "{FORMS[kind]}"')
    return TopK(numbers[0]) if kind == "topk" else Layers(numbers)
