"""The byte-level BPE tokenizer: training, saving in the usual files, loading, encoding and decoding.

Any text survives encoding and decoding unchanged: there is no normaliser, and every byte is a token. Every encoded text
begins with `<|endoftext|>`, which opens a document and, as the label of its last token, also closes it.
"""

import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moe_jax.text import declared
from moe_jax.text.documents import Document

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# Merges stay within these pieces: a word with one mark or space before it; up to three digits; marks with the space
# before them and, at the end of a line, the next line's indentation; blank lines with that indentation; other space.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
# The files that are copied with the weights from one model folder to another.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)
_ENCODE_AT_ONCE = 512  # documents
_LAST_IDS = 16  # ids of a prompt that are decoded together with a continuation; more if these have no text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learns byte pairs (Sennrich et al., 2016) from training texts.

    Args:
        texts: the training documents, without held-out ones. The same texts give the same tokenizer.
        vocab_size: number of tokens, including `<|endoftext|>` (id 0) and the 256 bytes.

    Returns:
        The tokenizer. `encode(text)` begins with `<|endoftext|>`; the same characters *in* a text are ordinary text.

    Raises:
        ValueError: the texts have too few pairs for `vocab_size`.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"text.vocab_size = {vocab_size}: the training text has pairs for {tokenizer.get_vocab_size()} tokens only"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)],
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: str | os.PathLike, max_context: int) -> None:
    """Writes `tokenizer.json`, and two more files that `transformers.AutoTokenizer` reads.

    Args:
        tokenizer: from `train_tokenizer`.
        folder: must exist.
        max_context: the model's context, in tokens.
    """
    folder = pathlib.Path(folder)
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # `<|endoftext|>` in a text is text, as in `train_tokenizer`
        **special,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: str | os.PathLike) -> tokenizers.Tokenizer:
    """Reads a model's tokenizer: `tokenizer.json`, and the files beside it (see `declared.apply`).

    Args:
        folder: of the model, or the path of `tokenizer.json`.

    Raises:
        ValueError: it is missing or not a tokenizer, or a file beside it is damaged.
    """
    path = pathlib.Path(folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is missing: a model's folder holds the tokenizer that it was trained with")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{path} is not a tokenizer: {' '.join(str(error).split())}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config_path = path.parent / declared.CONFIG
    try:
        splits = bool(declared.read_fields(config_path).get("split_special_tokens", False))
    except ValueError as error:
        raise ValueError(f"{config_path} is damaged: {error}") from error
    tokenizer = declared.apply(tokenizer, path.parent)
    tokenizer.encode_special_tokens = splits
    return tokenizer


def read_tokenizer_files(folder: str | os.PathLike) -> dict[str, bytes]:
    """Reads the tokenizer files that a folder has; the keys are their names."""
    folder = pathlib.Path(folder)
    return {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}


def tokenizer_files(tokenizer: tokenizers.Tokenizer, max_context: int) -> dict[str, bytes]:
    """The contents of the files that `save_tokenizer` writes; the keys are their names."""
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(tokenizer, scratch, max_context)
        return read_tokenizer_files(scratch)


def encode_documents(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> list[np.ndarray]:
    """Encodes whole documents, in order.

    The characters of a special token in a document are ordinary text, unless its `special_tokens` is set. If it is, and
    the document already begins with the token that the tokenizer puts before a text, nothing is added.

    Returns:
        One int32 array per document, beginning with the tokens that the tokenizer puts before a text.
    """
    arrays = [np.zeros(0, np.int32)] * len(documents)
    encode_special_tokens = tokenizer.encode_special_tokens
    opening = tokenizer.encode("").ids[:1]
    try:
        for special_tokens in (False, True):
            tokenizer.encode_special_tokens = not special_tokens
            places = [place for place, document in enumerate(documents) if document.special_tokens == special_tokens]
            for first in range(0, len(places), _ENCODE_AT_ONCE):
                some = places[first : first + _ENCODE_AT_ONCE]
                texts = [documents[place].text for place in some]
                encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
                if special_tokens:
                    bare = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
                    encoded = [plain if plain[:1] == opening else ids for plain, ids in zip(bare, encoded)]
                for place, ids in zip(some, encoded):
                    arrays[place] = np.array(ids, np.int32)
    finally:
        tokenizer.encode_special_tokens = encode_special_tokens
    return arrays


def special_tokens(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    """Special tokens by id; decoding leaves them out."""
    added = tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.special}


class TextStream:
    """Decodes token ids one at a time into pieces of text that never end within a character.

    The pieces, including that of `flush()`, add up to the text of all ids decoded at once, or to what they add to the
    text of `before`. Special tokens have no text. Bytes that are not UTF-8 are held back until a whole character
    follows, and then appear as U+FFFD.

    Args:
        tokenizer: of the model.
        before: ids that the text continues, such as a prompt.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # The ids of the last piece, or the last of `before`: some decoders strip the space of the first token.
        self._shown = _last_with_text(tokenizer, before)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes one more id; returns the text that is complete by now, which may be empty."""
        self._pending.append(int(token_id))
        text = self._pending_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Ends the stream; returns the text held back, with U+FFFD for an incomplete character."""
        text = self._pending_text()
        self._shown, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._shown, skip_special_tokens=True)
        text = self._tokenizer.decode(self._shown + self._pending, skip_special_tokens=True)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text))
        return text[sum(1 for _ in alike) :]  # an incomplete character in `before` may change


def _last_with_text(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> list[int]:
    """The last ids: enough of them to have text and not to begin within a character, or all."""
    count = _LAST_IDS
    while count < len(ids):
        text = tokenizer.decode(list(ids[-count:]), skip_special_tokens=True)
        if text.strip() and not text.startswith("\N{REPLACEMENT CHARACTER}"):
            break
        count *= 2
    return list(ids[-count:])
