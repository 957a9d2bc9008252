"""Checks of settings: each raises ValueError that names the setting, what was given and what would be accepted."""

import math


def require(condition: bool, setting: str, given, expected: str) -> None:
    """Refuses a setting, written `section.field`, where the condition does not hold."""
    if not condition:
        raise ValueError(f"{setting} = {given!r}: expected {expected}")


def require_positive(section: str, config, *fields: str) -> None:
    """Refuses fields of a section that are not above zero and finite."""
    for field in fields:
        value = getattr(config, field)
        require(value > 0 and math.isfinite(value), f"{section}.{field}", value, "a positive number")


def require_fraction(section: str, config, *fields: str) -> None:
    """Refuses fields of a section that are not within 0 and 1."""
    for field in fields:
        value = getattr(config, field)
        require(0 <= value <= 1, f"{section}.{field}", value, "a number from 0 to 1")


def require_one_of(section: str, config, field: str, choices: tuple[str, ...]) -> None:
    """Refuses a field of a section that is none of the choices."""
    value = getattr(config, field)
    require(value in choices, f"{section}.{field}", value, f"one of {', '.join(choices)}")
