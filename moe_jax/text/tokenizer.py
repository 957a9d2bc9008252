"""The byte-level BPE tokenizer: trained, saved as other tools read it, loaded, and used.

Any text survives encoding and decoding unchanged: there is no normaliser, and every byte is a token. Every encoded text
begins with `<|endoftext|>`, which both opens a document and, as the label behind its last token, closes it.
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
from moe_jax.text.corpus import Document

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# Merges never cross these: a word with the one mark or space before it; up to three digits; marks with the space before
# them and, at the end of a line, the next line's indentation; blank lines with that indentation; other space.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
# What travels with the weights from one folder of a model to another.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)
_ENCODE_AT_ONCE = 512  # documents
_LAST_IDS = 16  # of a prompt, that a continuation is decoded behind; more where those have no text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learns byte pairs (Sennrich et al., 2016) from training texts.

    Args:
      texts: the training documents, and nothing that is held out. The same texts give the same tokenizer.
      vocab_size: tokens, `<|endoftext|>` (id 0) and the 256 bytes included.

    Returns:
      The tokenizer. `encode(text)` puts `<|endoftext|>` first; the same characters *in* a text are ordinary text.

    Raises:
      ValueError: the texts do not have that many pairs.
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
    """Writes `tokenizer.json` and the two files beside it with which `transformers.AutoTokenizer` loads it.

    Args:
      tokenizer: as `train_tokenizer` makes it.
      folder: must exist.
      max_context: tokens that the model takes.
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
    """Reads `tokenizer.json` from a model's folder (or the file itself), and what lies beside it, see `declared.apply`.

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
    beside = path.parent / declared.CONFIG
    try:
        splits = bool(declared.read_fields(beside).get("split_special_tokens", False))
    except ValueError as error:
        raise ValueError(f"{beside} is damaged: {error}") from error
    tokenizer = declared.apply(tokenizer, path.parent)
    tokenizer.encode_special_tokens = splits
    return tokenizer


def read_tokenizer_files(folder: str | os.PathLike) -> dict[str, bytes]:
    """Reads the files that make up a tokenizer, those of them that a folder has, by name."""
    folder = pathlib.Path(folder)
    return {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}


def tokenizer_files(tokenizer: tokenizers.Tokenizer, max_context: int) -> dict[str, bytes]:
    """The files that `save_tokenizer` writes, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(tokenizer, scratch, max_context)
        return read_tokenizer_files(scratch)


def encode_documents(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> list[np.ndarray]:
    """Encodes whole documents, in order.

    The characters of a special token within a document are ordinary text, unless the document says `special_tokens`. If
    it does and begins with the token that the tokenizer puts before a text, the tokenizer adds nothing.

    Returns:
      One int32 array per document; each begins with what the tokenizer puts before a text (`<|endoftext|>` for ours).
    """
    arrays = [np.zeros(0, np.int32)] * len(documents)
    encode_special_tokens = tokenizer.encode_special_tokens
    opening = tokenizer.encode("").ids[:1]
    try:
        for special_tokens in (False, True):
            tokenizer.encode_special_tokens = not special_tokens
            places = [place for place, one in enumerate(documents) if one.special_tokens == special_tokens]
            for first in range(0, len(places), _ENCODE_AT_ONCE):
                some = places[first : first + _ENCODE_AT_ONCE]
                texts = [documents[place].text for place in some]
                encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
                if special_tokens:
                    bare = [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
                    encoded = [own if own[:1] == opening else ids for own, ids in zip(bare, encoded)]
                for place, ids in zip(some, encoded):
                    arrays[place] = np.array(ids, np.int32)
    finally:
        tokenizer.encode_special_tokens = encode_special_tokens
    return arrays


def special_tokens(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    """The tokens that decoding leaves out, by id."""
    added = tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.special}


class TextStream:
    """Turns token ids, as they come, into pieces of text that never end in half a character.

    The pieces, `flush()` included, add up to what decoding all ids at once gives, or adds to what it gives for the ids
    before; special tokens have no text. Bytes that cannot be UTF-8 are held back until a whole character follows, then
    come as U+FFFD.

    Args:
        tokenizer: of the model.
        before: ids that the text goes on from, such as a prompt.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # The ids of the last piece, or the last ids before: some decoders strip the space of the first token.
        self._shown = _last_with_text(tokenizer, before)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Takes one more id; returns the text that is now certain, which may be empty."""
        self._pending.append(int(token_id))
        text = self._pending_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Ends the stream; returns what was held back, with U+FFFD for a character that never became whole."""
        text = self._pending_text()
        self._shown, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._shown, skip_special_tokens=True)
        text = self._tokenizer.decode(self._shown + self._pending, skip_special_tokens=True)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text))
        return text[sum(1 for _ in alike) :]  # half a character before may become whole


def _last_with_text(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> list[int]:
    """The last of some ids, so many that they have text and do not begin within a character, or all of them."""
    count = _LAST_IDS
    while count < len(ids):
        text = tokenizer.decode(list(ids[-count:]), skip_special_tokens=True)
        if text.strip() and not text.startswith("\N{REPLACEMENT CHARACTER}"):
            break
        count *= 2
    return list(ids[-count:])
