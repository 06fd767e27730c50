"""Captions: from a table's raw bytes to clean text, or the reason why not.

Tables from the web hold lone surrogates, NULs, broken UTF-8 and every kind of space. The rules, in this order:

1. Bytes that aren't UTF-8 are refused (`caption_not_text`), but for surrogates written as UTF-8: pairs are joined,
   lone ones dropped.
2. NULs and other control characters become spaces; so do line breaks and every Unicode space.
3. Zero-width spaces and joiners stay where scripts and emoji need them; byte-order marks and non-characters go.
4. Unicode normal form C; runs of spaces shrink to one, the ends are trimmed.
5. Empty, too short or too long: refused, or cut at a word (`CaptionConfig`).
"""

from __future__ import annotations

import re
import unicodedata

from data_prep.account import Refused
from data_prep.config import CaptionConfig

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_DROPPED = re.compile("[\ufeff\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]+")
_SPACES = re.compile(r"\s+")


def clean(raw: bytes | None, options: CaptionConfig) -> str:
    """The caption as it is stored.

    Args:
        raw: UTF-8 as the table holds it; None where the table has no value.

    Raises:
        Refused: caption_not_text, caption_empty, caption_too_short or caption_too_long.
    """
    text = normalise(decode(raw or b""))
    if not text:
        raise Refused("caption_empty", "the caption is empty")
    if len(text) < options.min_chars:
        raise Refused("caption_too_short", f"{len(text)} characters, fewer than {options.min_chars}")
    if len(text) <= options.max_chars:
        return text
    if options.too_long == "refuse":
        raise Refused("caption_too_long", f"{len(text)} characters, more than {options.max_chars}")
    return _cut(text, options.max_chars)


def decode(raw: bytes) -> str:
    """UTF-8 to text; surrogate pairs that were encoded one by one are joined, lone surrogates stay for the caller."""
    try:
        text = raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise Refused("caption_not_text", f"not UTF-8 at byte {error.start}") from None
    # A round trip through UTF-16 joins pairs and keeps lone surrogates.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def normalise(text: str) -> str:
    """Rules 2 to 4: printable text in normal form C with single spaces."""
    text = _DROPPED.sub("", _CONTROLS.sub(" ", text))
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def _cut(text: str, max_chars: int) -> str:
    """The longest run of whole words within the limit; a single overlong word is cut inside, never before an accent."""
    head = text[: max_chars + 1]
    space = head.rfind(" ")
    if space > 0:
        return head[:space]
    end = max_chars
    while end > 1 and unicodedata.combining(text[end]):
        end -= 1
    return text[:end]
