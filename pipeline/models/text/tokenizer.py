"""From captions to token numbers: open_clip's byte-pair encoding, or any vocabulary file.

Legend: B texts, L tokens.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.models.text.open_clip_file import open_clip_file

BYTE_PAIRS = "clip"
VOCAB_SIZE = 49408  # of CLIP's byte-pair encoding: 512 bytes, 48,894 merges, start and end
SMALLEST_VOCAB = 514  # 512 byte tokens, start and end: every text can still be encoded

log = logging.getLogger("vitrail")


class Vocabulary(NamedTuple):
    """What a text tower needs to know about its tokens."""

    size: int
    end: int | None  # the token that ends a text, where there is one
    padding: int


@runtime_checkable  # tests check annotations at run time
class _Encoder(Protocol):
    """One kind of tokenizer."""

    vocabulary: Vocabulary

    def encode(self, text: str) -> list[int]:
        """All tokens of the text, including those that begin and end it."""
        ...

    def decode(self, tokens: list[int]) -> str: ...


class CaptionTokenizer:
    """Captions to token numbers, padded to `context_length`; cheap to pickle into loader workers.

    Args:
        name: `clip`, open_clip's tokenizer; or a file, local or s3://: `vocab.txt`, BERT's WordPiece as the official
            FLIP uses it (lower case, no special tokens); `tokenizer.json`, as Hugging Face's tokenizers are saved, with
            the special tokens it adds.
        context_length: tokens; of a longer caption the first tokens are kept, and the token that ends a text.
        vocab_size: of `clip`, to use fewer merges than its 48,894; every text can still be encoded, in more tokens.

    Raises:
        ConfigError (when first used): no such file, or no such tokenizer.
    """

    def __init__(self, name: str, context_length: int, vocab_size: int | None = None) -> None:
        self.name = name
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.num_seen = 0
        self.num_cut = 0

    def __call__(self, texts: list[str]) -> Int[Tensor, "b l"]:
        """Token numbers; captions that are too long are counted, with a warning at the 1st, 10th, 100th and so on."""
        encoder = self._encoder
        _, end, padding = encoder.vocabulary
        tokens = torch.full((len(texts), self.context_length), padding, dtype=torch.long)
        for row, text in enumerate(texts):
            numbers = encoder.encode(text)
            self.num_seen += 1
            if len(numbers) > self.context_length:
                self._count_cut(len(numbers))
                numbers = numbers[: self.context_length]
                if end is not None:
                    numbers[-1] = end
            tokens[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return tokens

    def decode(self, tokens: Int[Tensor, " l"]) -> str:
        """The caption again, as the tokenizer normalises it."""
        return self._encoder.decode(tokens.tolist()).strip()

    @property
    def vocabulary(self) -> Vocabulary:
        """Size and special tokens."""
        return self._encoder.vocabulary

    @property
    def _encoder(self) -> _Encoder:
        return _encoder(self.name, self.vocab_size)

    def _count_cut(self, length: int) -> None:
        self.num_cut += 1
        if str(self.num_cut).strip("0") == "1":
            log.warning(
                "a caption of %d tokens was cut to the context of %d; %d of %d captions so far in this process",
                length,
                self.context_length,
                self.num_cut,
                self.num_seen,
            )


@functools.cache
def _encoder(name: str, vocab_size: int | None) -> _Encoder:
    if name == BYTE_PAIRS:
        return _BytePairs(vocab_size or VOCAB_SIZE)
    if not name.endswith((".txt", ".json")):
        raise ConfigError(
            f"no tokenizer is called {name!r}",
            where="options.text.tokenizer",
            fix="use clip, a vocab.txt (WordPiece), or a tokenizer.json",
        )
    try:
        content = storage.read(name).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file", where=f"options.text.tokenizer: {name}", fix="check the path") from None
    return _File(content, name)


class _BytePairs:
    """open_clip's tokenizer, restricted to its first merges where a smaller vocabulary is configured."""

    def __init__(self, size: int) -> None:
        self._inner = _open_clip_tokenizer()
        if size < VOCAB_SIZE:
            merges = list(self._inner.bpe_ranks)[: size - SMALLEST_VOCAB]
            words = [self._inner.decoder[i] for i in range(512 + len(merges))]
            words += ["<start_of_text>", "<end_of_text>"]
            self._inner.bpe_ranks = {merge: rank for rank, merge in enumerate(merges)}
            self._inner.encoder = {word: number for number, word in enumerate(words)}
            self._inner.decoder = dict(enumerate(words))
        self._start, self._end = size - 2, size - 1
        self.vocabulary = Vocabulary(size, self._end, 0)

    def encode(self, text: str) -> list[int]:
        return [self._start, *self._inner.encode(text), self._end]

    def decode(self, tokens: list[int]) -> str:
        if self._end in tokens:
            tokens = tokens[: tokens.index(self._end)]
        special = {self._start, self._end}
        text: str = self._inner.decode([token for token in tokens if token not in special])
        return text


class _File:
    """A vocabulary file, through the `tokenizers` package."""

    def __init__(self, content: str, name: str) -> None:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        if name.endswith(".txt"):
            words = content.splitlines()
            numbers = {word: number for number, word in enumerate(words)}
            if "[UNK]" not in numbers:
                raise ConfigError(
                    "it has no [UNK] token, so it isn't a WordPiece vocabulary",
                    where=f"options.text.tokenizer: {name}",
                    fix="give BERT's vocab.txt, one word a line",
                )
            self._inner: Any = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
            self._inner.normalizer = normalizers.BertNormalizer(lowercase=True)
            self._inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            self.vocabulary = Vocabulary(len(numbers), None, numbers.get("[PAD]", 0))
            self._added = False
            return
        try:
            self._inner = Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(
                f"it can't be read ({str(error)[:200]})",
                where=f"options.text.tokenizer: {name}",
                fix="give a tokenizer.json as Hugging Face's tokenizers save it",
            ) from None
        self._inner.no_padding()
        self._inner.no_truncation()
        ends = [self._inner.token_to_id(word) for word in ("</s>", "<eos>", "[SEP]", "<|endoftext|>")]
        pads = [self._inner.token_to_id(word) for word in ("<pad>", "[PAD]", "</s>", "<|endoftext|>")]
        end = next((number for number in ends if number is not None), None)
        padding = next((number for number in pads if number is not None), 0)
        self.vocabulary = Vocabulary(self._inner.get_vocab_size(), end, padding)
        self._added = True

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._inner.encode(text, add_special_tokens=self._added).ids
        return tokens

    def decode(self, tokens: list[int]) -> str:
        text: str = self._inner.decode([token for token in tokens if token != self.vocabulary.padding])
        return text


def _open_clip_tokenizer() -> Any:
    """open_clip's tokenizer; its module doesn't need the rest of the package."""
    return open_clip_file("tokenizer").SimpleTokenizer()
