"""Checks of settings: each raises a ValueError with the setting, its value and what was expected."""

import math


def require(condition: bool, setting: str, given, expected: str) -> None:
    """Refuses the setting `section.field` unless the condition holds."""
    if not condition:
        raise ValueError(f"{setting} = {given!r}: expected {expected}")


def require_positive(section: str, config, *fields: str) -> None:
    """Refuses fields that are not positive and finite."""
    for field in fields:
        value = getattr(config, field)
        require(value > 0 and math.isfinite(value), f"{section}.{field}", value, "a positive number")


def require_fraction(section: str, config, *fields: str) -> None:
    """Refuses fields outside 0 to 1."""
    for field in fields:
        value = getattr(config, field)
        require(0 <= value <= 1, f"{section}.{field}", value, "a number from 0 to 1")


def require_one_of(section: str, config, field: str, choices: tuple[str, ...]) -> None:
    """Refuses a field that is not one of the choices."""
    value = getattr(config, field)
    require(value in choices, f"{section}.{field}", value, f"one of {', '.join(choices)}")
