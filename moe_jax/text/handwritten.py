"""Which files of a source were not written by hand: generated tables, recorded data, lines that no one types."""

import re

MIN_BYTES = 200  # smaller files are left out
MAX_LIBRARY_BYTES = 512 * 1024  # larger library files are left out: most are generated
MAX_LINE_CHARACTERS = 1000  # a file with longer lines was not written by hand
MAX_DATA_FRACTION = 0.25  # share of characters in numbers, escapes and unbroken ASCII runs of 80 or more

_GENERATED = re.compile(
    r"auto-?\s?generated|automatically generated|file (?:is|was) generated|^\W*(?:file )?generated (?:by|from)"
    r"|generated from ['\"]|do(?: not|n't) (?:manually )?edit",
    re.IGNORECASE | re.MULTILINE,
)
_GENERATED_NAMES = re.compile(r"(_pb2|_pb2_grpc)\.py$|(^|/)(_sysconfigdata\w*|_version)\.py$")
_DATA = re.compile(r"0[xX][0-9a-fA-F]+|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|[-+]?\d[\d_.]*(?:[eE][-+]?\d+)?|[!-~]{80,}")


def why_not(name: str, text: str, library: bool = False) -> str:
    """The reason to leave out a file; "" if there is none. Files of libraries are judged more strictly."""
    num_bytes = len(text.encode())
    if num_bytes < MIN_BYTES:
        return "tiny"
    if library and num_bytes > MAX_LIBRARY_BYTES:
        return "large"
    if _GENERATED_NAMES.search(name) or _GENERATED.search(text[:1000]):
        return "generated"
    if max(map(len, text.split("\n"))) > MAX_LINE_CHARACTERS and (library or name.endswith(".py")):
        return "data"
    in_data = sum(match.end() - match.start() for match in _DATA.finditer(text))
    return "data" if in_data > MAX_DATA_FRACTION * len(text) else ""
