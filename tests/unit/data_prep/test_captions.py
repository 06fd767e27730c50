import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.account import Refused
from data_prep.config import CaptionConfig
from data_prep.samples.captions import clean

OPTIONS = CaptionConfig()


@pytest.mark.parametrize(
    ("raw", "stored"),
    [
        (b"a cat", "a cat"),
        ("  a \t cat\r\n on\u00a0a\u3000mat ".encode(), "a cat on a mat"),
        ("caf\u0065\u0301".encode(), "caf\u00e9"),
        (b"nul\x00inside", "nul inside"),
        ("\ufeffmarked".encode(), "marked"),
        ("\u732b\u306e\u5199\u771f".encode(), "\u732b\u306e\u5199\u771f"),
        ("family \U0001f468\u200d\U0001f469".encode(), "family \U0001f468\u200d\U0001f469"),
        (b"lone \xed\xa0\x80 surrogate", "lone surrogate"),
        (b"pair \xed\xa0\xbd\xed\xb8\x80", "pair \U0001f600"),
    ],
)
def test_captions_are_stored_clean(raw: bytes, stored: str) -> None:
    assert clean(raw, OPTIONS) == stored


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "caption_empty"),
        (b"", "caption_empty"),
        (b" \x00\t\xe3\x80\x80", "caption_empty"),
        (b"\xed\xa0\x80", "caption_empty"),
        (b"latin-1 caf\xe9", "caption_not_text"),
    ],
)
def test_unusable_captions_are_refused_with_their_reason(raw: bytes | None, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        clean(raw, OPTIONS)
    assert refused.value.reason == reason


def test_length_limits_count_characters_after_cleaning() -> None:
    with pytest.raises(Refused) as refused:
        clean(b"  ab  ", CaptionConfig(min_chars=3))
    assert refused.value.reason == "caption_too_short"
    with pytest.raises(Refused) as refused:
        clean(b"abcd", CaptionConfig(max_chars=3, too_long="refuse"))
    assert refused.value.reason == "caption_too_long"


def test_long_captions_are_cut_at_a_word() -> None:
    assert clean(b"one two three", CaptionConfig(max_chars=9)) == "one two"
    assert clean(b"one two three", CaptionConfig(max_chars=7)) == "one two"
    assert clean(b"indivisible", CaptionConfig(max_chars=5)) == "indiv"


@given(st.text(alphabet=st.characters(codec=None, exclude_categories=())))
def test_whatever_the_text_a_stored_caption_is_clean_utf8_and_stays_as_it_is(text: str) -> None:
    try:
        stored = clean(text.encode("utf-8", "surrogatepass"), CaptionConfig(max_chars=20))
    except Refused:
        return
    assert 0 < len(stored) <= 20
    assert stored == stored.strip()
    assert "\0" not in stored
    assert clean(stored.encode(), CaptionConfig(max_chars=20)) == stored
