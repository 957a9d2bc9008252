"""Finds models by their names on a hub, such as `allenai/OLMoE-1B-7B-0924@main`, with huggingface_hub and its cache.

Only configuration, tokenizer, chat templates and weights in safetensors are fetched. Pickled weights are refused, since
they can run code when they are read.
"""

import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import logging

from moe_jax.checkpoint.tables import INDEX, LAYOUT, WEIGHTS, read_json

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Found(NamedTuple):
    """Where a model is.

    Attributes:
        folder: has its small files.
        fetch: fetches its weights into that folder, or raises ValueError; None: nothing to fetch.
    """

    folder: pathlib.Path
    fetch: Callable[[], None] | None = None


def find(path: str | os.PathLike, setting: str = "model.path") -> Found:
    """Finds a model. A path that exists, or does not look like a name on a hub, is taken as a folder.

    Args:
        path: a folder, or `organisation/name`, or `organisation/name@revision` (a branch, a tag or a commit).
            huggingface_hub reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE to look such a name up.
        setting: gave the path, for messages.

    Raises:
        ValueError: the model can neither be fetched nor is complete in the cache, or it has only pickled weights.
    """
    name = _NAME.fullmatch(os.fspath(path))
    if name is None or os.path.exists(path):
        return Found(pathlib.Path(path))
    repository, revision = name[1], name[2] or "main"
    try:
        return _fetched(repository, revision)
    except _Refused:
        raise
    except Exception as error:  # huggingface_hub and its dependencies raise many kinds
        reason = error
    folder = _cached(repository, revision)
    missing = "all of it" if folder is None else _missing(folder)
    if missing:
        raise ValueError(
            f"{setting} = {os.fspath(path)!r} is not a folder, and as a model of a hub it cannot be fetched "
            f"({_reason_of(reason)}) and the cache lacks {missing}: expected {LAYOUT}, or a name that can be fetched"
        ) from reason
    logging.warning("%s is taken from the cache: %s", os.fspath(path), _reason_of(reason))
    return Found(folder)


class _Refused(ValueError):
    """The hub has the model, but not in a form that can be read."""


def _fetched(repository: str, revision: str) -> Found:
    """Fetches the small files that are not yet in the cache."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    names = [
        file.rfilename for file in huggingface_hub.HfApi().model_info(repository, revision=revision).siblings or ()
    ]
    if "config.json" not in names:
        raise _Refused(f"{repository} at {revision} has no config.json: expected {LAYOUT}")
    small = [name for name in names if name in _SMALL or _TEMPLATES.fullmatch(name)]
    weights = _weights(repository, revision, names)
    folder = pathlib.Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=small))

    def fetch() -> None:
        try:
            huggingface_hub.snapshot_download(repository, revision=folder.name, allow_patterns=weights)
        except Exception as error:  # as above
            if missing := _missing(folder):
                raise ValueError(f"{repository}: {missing} cannot be fetched: {_reason_of(error)}") from error

    return Found(folder, fetch)


def _weights(repository: str, revision: str, names: Sequence[str]) -> list[str]:
    """The weight files among the files of a repository."""
    import huggingface_hub

    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX in names:
        index = huggingface_hub.hf_hub_download(repository, INDEX, revision=revision)
        return [INDEX, *_shards(pathlib.Path(index))]
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        raise _Refused(
            f"{repository} at {revision} has only pickled weights ({pickled[0]}), which may run any code and are not "
            "read: expected safetensors"
        )
    raise _Refused(f"{repository} at {revision} has neither {WEIGHTS} nor {INDEX}: expected {LAYOUT}")


def _shards(index: pathlib.Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    return sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []


def _cached(repository: str, revision: str) -> pathlib.Path | None:
    """The model's folder in the cache; None if there is none."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(repository, "config.json", revision=revision)
    return pathlib.Path(config).parent if isinstance(config, str) else None


def _missing(folder: pathlib.Path) -> str:
    """The first weight file that a folder in the cache lacks; "": none."""
    if (folder / WEIGHTS).exists():
        return ""
    expected = _shards(folder / INDEX) if (folder / INDEX).exists() else [WEIGHTS]
    return next((name for name in expected if not (folder / name).exists()), "")


def _reason_of(error: Exception) -> str:
    """The reason why nothing was fetched."""
    from huggingface_hub import constants, errors

    at = constants.ENDPOINT
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return f"{at} asks you to accept the model's terms there, and to set a token in HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{at} has no such revision of the model"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{at} has no such model, or shows it only with a token in HF_TOKEN"
    reason = " ".join(str(error).split())[:200]
    return f"{at} does not answer as expected ({type(error).__name__}: {reason})"
