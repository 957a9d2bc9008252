"""Installed distributions as text sources, by name."""

import difflib
import importlib.metadata
import re


def find(source: str) -> importlib.metadata.Distribution | None:
    """The installed distribution of that name, if there is one."""
    if not re.fullmatch(r"[A-Za-z0-9]+([._-]+[A-Za-z0-9]+)*", source):
        return None
    try:
        return importlib.metadata.distribution(source)
    except importlib.metadata.PackageNotFoundError:
        return None


def did_you_mean(source: str, *others: str) -> str:
    """A hint for an unknown name: the distribution, or the one of `others`, with the most similar name; else ""."""
    installed = importlib.metadata.distributions()
    names = sorted({name for distribution in installed if (name := distribution.metadata["Name"])})
    near = difflib.get_close_matches(source, [*others, *names], n=1)
    return f'; did you mean "{near[0]}"?' if near else ""
