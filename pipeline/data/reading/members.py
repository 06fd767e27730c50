"""Members of a raw sample: its image, caption and label."""

from __future__ import annotations

import json

from pipeline.data.batch import RawSample, derive_seed
from pipeline.data.images.decode import Encoded, UnreadableSample
from pipeline.data.reading.tar import first_image


def image_member(sample: RawSample) -> Encoded:
    """The encoded image.

    Raises:
        UnreadableSample: there is none.
    """
    data = first_image(sample.members)
    if data is not None:
        return data
    raise UnreadableSample(f"no image among its members ({', '.join(sorted(sample.members)) or 'none'})")


def drawn_caption(sample: RawSample, seed: int) -> str:
    """One of the sample's captions, drawn evenly by its seed: of `captions`, a list in its `json` member, where it has
    one, else the `txt` member.

    Raises:
        UnreadableSample: see `caption`; or `captions` is no list of texts.
    """
    data = sample.member("json")
    if data is None or b'"captions"' not in data:
        return caption(sample)
    try:
        written = json.loads(data).get("captions")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UnreadableSample("damaged json member") from error
    if written is None:
        return caption(sample)
    if not isinstance(written, list) or not written or not all(isinstance(text, str) for text in written):
        raise UnreadableSample("captions of the json member is no list of texts")
    chosen: str = written[derive_seed("caption", seed) % len(written)]
    return chosen


def caption(sample: RawSample) -> str:
    """The `txt` member, UTF-8.

    Raises:
        UnreadableSample: there is none, or it is no UTF-8.
    """
    data = sample.member("txt")
    if data is None:
        raise UnreadableSample("no txt member")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableSample("txt is no UTF-8") from error


def label(sample: RawSample) -> int:
    """The class number in the `cls` member.

    Raises:
        UnreadableSample: there is none, or it is no number.
    """
    data = sample.member("cls")
    if data is None:
        raise UnreadableSample("no cls member")
    return class_number(data)


def class_number(data: bytes) -> int:
    """What a `cls` member says, an integer in ASCII digits.

    Raises:
        UnreadableSample: it is no such integer.
    """
    text = data.strip()
    if not text.isdigit() or len(text) > 9:
        raise UnreadableSample(f"cls {data[:20]!r} is no class number")
    return int(text)
