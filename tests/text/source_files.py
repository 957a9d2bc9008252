"""Files that look like source and resemble no held-out file."""

import random


def write(folder, **files):
    """Python files by their stem; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return str(folder)


def unrelated(seed):
    """Sixty lines that have little in common with those of other seeds."""
    words = ["red", "green", "blue", "value", "count", "index", "merge", "split", "left", "right", "token"]
    draw = random.Random(seed)
    return "\n".join(f"{draw.choice(words)}_{draw.choice(words)} = {draw.choice(words)}" for _ in range(60))
