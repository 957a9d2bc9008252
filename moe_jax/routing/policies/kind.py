"""What a kind of policy is: its spec, the columns that it sets, and what they do to the slots of tokens."""

import dataclasses
from typing import ClassVar, Self

import jax
import numpy as np

from moe_jax.routing.policies.by_weight import ByWeight
from moe_jax.routing.policies.columns import Columns, Model, PerLayer
from moe_jax.routing.selection import Routing, Slots


@dataclasses.dataclass(frozen=True)
class Kind:
    """Base of all kinds: a dataclass whose fields are the numbers after the colon. An instance is a part of a policy.

    Fields without a default are written in order, the others as name=value where they differ from it. A kind that
    derives from this class alone sets columns that `select` itself reads or on which another kind acts: `topk` and
    `schedule` both set `k`, `median` those of `ratio`. Kinds that set the same columns exclude each other, and exactly
    one of them gives `neutral` values.

    The first line of the docstring and the paper that it cites are a row of the table in docs/policies.md.
    """

    name: ClassVar[str]  # before the colon
    form: ClassVar[str]  # an example of a spec
    sets: ClassVar[tuple[str, ...]]  # names of its columns

    @classmethod
    def parsed(cls, words: list[str]) -> Self:
        """An instance from the words between the commas.

        Raises:
            ValueError: one of them is not known here, is given twice, is missing or is no number.
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

    def columns(self, model: Model) -> Columns:
        """The settings of each MoE layer; ValueError where they do not fit the model."""
        raise NotImplementedError

    @classmethod
    def neutral(cls, model: Model) -> Columns:
        """Settings that leave a row what it has without this kind; none where the columns are another kind's."""
        return ()


class RowWise(Kind):
    """A kind that decides for each token by itself, in prompts and decode steps alike.

    Its columns are always there, so that requests with and without it share one compiled step. A slot has to pass all
    row-wise kinds; each looks at the slots that the token's k offers, not at what the others leave of them.
    """

    @staticmethod
    def keeps(offered: ByWeight, *columns_N: jax.Array) -> jax.Array:
        """bool_NK: which of the offered slots the kind keeps; the columns come in the order of `sets`."""
        raise NotImplementedError


class StepWise(Kind):
    """A kind that decides for all rows of a decode step together, and leaves the reading of prompts alone.

    Its columns are there where some row has it, and are part of the compiled step then. Step-wise kinds act after the
    row-wise ones, each on what the one before it leaves.
    """

    @staticmethod
    def choose(slots: Slots, routing: Routing, same_BB: jax.Array, *columns_B: jax.Array) -> Slots:
        """The slots of the B rows of one step.

        Args:
            slots: that the rows keep so far.
            routing: of the same rows.
            same_BB: bool, which rows act together; False for padding and finished rows.
            columns_B: in the order of `sets`; after them this layer's part of `table`, where there is one.
        """
        raise NotImplementedError

    @staticmethod
    def table(model: Model) -> np.ndarray | None:
        """[L, ...] of the model, which all rows share; None: the kind needs none."""
        return None


def value_of(text: str, kind: type) -> int | float | str | PerLayer:
    """The value of a field from its text; ValueError where it is none."""
    try:
        if kind == PerLayer:
            return tuple(float(number) for number in text.split("/"))
        return kind(text)
    except ValueError:
        expected = {int: "whole numbers of at least 1", float: "a number"}.get(kind, "numbers")
        raise ValueError(f"{text!r}: expected {expected}") from None


def _described(placed, named) -> str:
    words = [field.name for field in placed] + [f"{name}=..." for name in named]
    return ", ".join(words) if words else "nothing behind its name"
