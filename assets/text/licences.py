"""Refuses distributions whose licence is not permissive, as sources of what ships: the held-out text, the demo."""

import importlib.metadata
import re

PERMISSIVE = frozenset(
    ("MIT", "MIT-0", "MIT-CMU", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "PSF-2.0", "Python-2.0")
    + ("ISC", "HPND", "Zlib", "Unlicense", "CC0-1.0")
)
_PERMISSIVE_WORDS = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|Python Software Foundation|PSF|ISC|Historical Permission Notice|HPND|zlib|Unlicense"
    r"|CC0)\b",
    re.IGNORECASE,
)


def require_permissive(distribution: importlib.metadata.Distribution) -> None:
    """Refuses a distribution whose metadata does not state a permissive licence.

    The SPDX expression decides; without one the classifiers; without those the beginning of the licence text.

    Raises:
        ValueError: the licence is not stated, or not permissive.
    """
    metadata = distribution.metadata
    expression = metadata.get("License-Expression")
    classifiers = [
        one for one in metadata.get_all("Classifier") or () if re.match("License :: .* ::|License :: (?!OSI)", one)
    ]
    written = (metadata.get("License") or "").strip()[:200]
    if expression:
        permissive, licence = _is_permissive_expression(expression), expression
    elif classifiers:
        # every classifier, since it is unknown which of them holds for which file
        permissive = all(_PERMISSIVE_WORDS.search(one) for one in classifiers)
        licence = ", ".join(one.removeprefix("License :: ") for one in classifiers)
    else:
        copyleft = re.search(r"\b(A?L?GPL|MPL|GNU|Mozilla)", written)
        permissive, licence = bool(_PERMISSIVE_WORDS.search(written)) and not copyleft, written.split("\n")[0]
    if not permissive:
        raise ValueError(
            f"text.sources: the licence of {metadata['Name']!r} is {licence or 'not stated'!r}; expected a permissive "
            "one (MIT, BSD, Apache-2.0, PSF, ISC, HPND, Zlib, 0BSD, CC0, Unlicense)"
        )


def _is_permissive_expression(expression: str) -> bool:
    """Whether an SPDX expression is permissive: every part joined by AND, at least one part joined by OR."""
    for part in re.split(r"\s+AND\s+", re.sub(r"[()]", " ", expression), flags=re.IGNORECASE):
        choices = re.split(r"\s+OR\s+", part.strip(), flags=re.IGNORECASE)
        if not any(re.split(r"\s+WITH\s+", choice)[0].strip() in PERMISSIVE for choice in choices):
            return False
    return True
