"""The base classes of policy kinds: the spec, the columns that a kind sets, and how it selects slots."""

import dataclasses
from typing import ClassVar, Self

import jax
import numpy as np

from moe_jax.routing.policies.by_weight import ByWeight
from moe_jax.routing.policies.columns import Columns, ModelFacts, PerLayer
from moe_jax.routing.selection import Routing, Slots


@dataclasses.dataclass(frozen=True)
class Kind:
    """Base of all kinds: a dataclass whose fields are the values after the colon. An instance is a part of a policy.

    In a spec, fields without a default come in order; others are written name=value if they differ from the default. A
    kind that derives directly from this class sets columns that `select` or another kind reads: `topk` and `schedule`
    both set `k`, `median` sets those of `ratio`. Kinds that set the same columns exclude each other, and exactly one of
    them gives `neutral` values.

    The first line of the docstring and the cited paper make a row of the table in docs/policies.md.
    """

    name: ClassVar[str]  # before the colon
    form: ClassVar[str]  # an example of a spec
    sets: ClassVar[tuple[str, ...]]  # names of its columns

    @classmethod
    def parsed(cls, words: list[str]) -> Self:
        """Makes an instance from the words between the commas.

        Raises:
            ValueError: a word is unknown, given twice, missing or not a number.
        """
        fields = dataclasses.fields(cls)
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
                raise ValueError(f"{word!r} is not known here; expected {_described(placed, named)}")
            if field.name in values:
                raise ValueError(f"{field.name} is given twice")
            values[field.name] = value_of(text.strip(), field.type)
        if len(words) < len(placed):
            raise ValueError(f"expected {_described(placed, named)}")
        return cls(**values)

    @property
    def spec(self) -> str:
        """The text that parses to this part."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            text = "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
            if field.default is dataclasses.MISSING:
                words.append(text)
            elif value != field.default:
                words.append(f"{field.name}={text}")
        return ":".join([self.name, ",".join(words)]) if words else self.name

    def columns(self, model: ModelFacts) -> Columns:
        """The settings of each MoE layer; ValueError if they do not fit the model."""
        raise NotImplementedError

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """Settings with which the kind changes nothing; () if another kind gives them for the same columns."""
        return ()


class RowWise(Kind):
    """A kind that decides for each token separately, in prefills and decode steps.

    Its columns are always present, so that requests with and without it share one compiled step. A slot is kept only if
    all row-wise kinds keep it; each decides from all slots of the token's k, not from those that the others kept.
    """

    @staticmethod
    def keeps(offered: ByWeight, *columns_N: jax.Array) -> jax.Array:
        """bool_NK: which of the offered slots the kind keeps; the columns come in the order of `sets`."""
        raise NotImplementedError


class StepWise(Kind):
    """A kind that decides for all rows of a decode step together; it does not act in prefills.

    Its columns are present, and part of the compiled step, only if some row uses it. Step-wise kinds act after the
    row-wise ones, each on the slots that the previous one left.
    """

    @staticmethod
    def choose(slots: Slots, routing: Routing, same_BB: jax.Array, *columns_B: jax.Array) -> Slots:
        """Selects the slots of the B rows of one step.

        Args:
            slots: those that the rows keep so far.
            routing: the routing of the same rows.
            same_BB: bool, which rows act together; False for padding and finished rows.
            columns_B: in the order of `sets`, then this layer's part of `table`, if there is one.
        """
        raise NotImplementedError

    @staticmethod
    def table(model: ModelFacts) -> np.ndarray | None:
        """An array [L, ...] of the model, shared by all rows; None if the kind needs none."""
        return None


def value_of(text: str, kind: type) -> int | float | str | PerLayer:
    """Parses the value of a field; ValueError if it is not one."""
    try:
        if kind == PerLayer:
            return tuple(float(number) for number in text.split("/"))
        return kind(text)
    except ValueError:
        expected = {int: "whole numbers of at least 1", float: "a number"}.get(kind, "numbers")
        raise ValueError(f"{text!r}: expected {expected}") from None


def _described(placed, named) -> str:
    words = [field.name for field in placed] + [f"{name}=..." for name in named]
    return ", ".join(words) if words else "nothing after its name"
