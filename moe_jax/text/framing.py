"""The tokens that begin and end a text: found in a model's files, and put around whole documents."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers

from moe_jax.text import declared
from moe_jax.text.documents import Document
from moe_jax.text.tokenizer import encode_documents


def outer_ids(
    folder: str | os.PathLike, tokenizer: tokenizers.Tokenizer, token_ids: Mapping[str, int | Sequence[int]]
) -> tuple[int, int]:
    """Finds the ids that begin and end a text: first in the tokenizer's files, then in the model's configuration.

    A text begins with `bos_token`; if there is none, with the token that ends a text, so that both ids are the same.

    Args:
        folder: of the model; its `tokenizer_config.json`, or `special_tokens_map.json`, names the tokens.
        tokenizer: of the model.
        token_ids: `bos_token_id` and `eos_token_id` of a model's configuration; the first of several counts.

    Returns:
        The id that begins a text and the id that ends one.

    Raises:
        ValueError: neither file names such a token, or `tokenizer_config.json` is damaged.
    """
    named = {role: tokenizer.token_to_id(token) for role, token in declared.read_named(pathlib.Path(folder)).items()}
    ids = {name: int(np.atleast_1d(value)[0]) for name, value in token_ids.items() if np.size(value)}
    end = named.get("eos_token"), ids.get("eos_token_id")
    begin = named.get("bos_token"), *end, ids.get("bos_token_id")
    begin_id, end_id = (
        next((token_id for token_id in candidates if token_id is not None), None) for candidates in (begin, end)
    )
    if begin_id is None or end_id is None:
        raise ValueError(
            f"{folder} names no token that begins or ends a text: expected bos_token or eos_token in "
            "tokenizer_config.json, or eos_token_id in config.json"
        )
    return begin_id, end_id


def frame_documents(
    tokenizer: tokenizers.Tokenizer, documents: Sequence[Document], begin_id: int, end_id: int
) -> list[np.ndarray]:
    """Encodes whole documents, in order, each with one `begin_id` before it and one `end_id` after it.

    An id that the tokenizer or a chat template has already put there is not repeated. Other tokens that the tokenizer
    adds stay, between the two. If `begin_id` and `end_id` are the same, an array has no `end_id`: the beginning of the
    next document ends it (see `batches.pack`). White space that a chat template writes after a closing `end_id` is
    removed, since a model generates nothing after `end_id`.

    Args:
        tokenizer: of any model.
        documents: of any kind.
        begin_id: as `outer_ids` gives it; also the `end_of_text` of `batches.pack`.
        end_id: as `outer_ids` gives it.

    Returns:
        One int32 array per document. For a tokenizer trained here they equal those of `encode_documents`, without the
        `end_id` at the end of a conversation.
    """
    end = tokenizer.id_to_token(end_id)
    documents = [_cut_after(end, document) if document.special_tokens and end else document for document in documents]
    opening, closing = np.array([begin_id], np.int32), np.array([end_id] * (end_id != begin_id), np.int32)
    arrays = []
    for ids in encode_documents(tokenizer, documents):
        first, last = 0, len(ids)
        while first < last and ids[first] == begin_id:
            first += 1
        while last > first and ids[last - 1] == end_id:
            last -= 1
        arrays.append(np.concatenate([opening, ids[first:last], closing]))
    return arrays


def _cut_after(end: str, document: Document) -> Document:
    text = document.text.rstrip()
    return dataclasses.replace(document, text=text) if text.endswith(end) else document
