"""The base of all sources' options, with the questions that a build asks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_prep.sources import SOURCES
from pipeline.config import TypedOptions

if TYPE_CHECKING:
    from data_prep.sources.base import Source


class SourceOptions(TypedOptions):
    """Options of a source, which stand beside it: see `SOURCES`.

    Rows are often somebody else's, so they may name only places below the source's own, in its bucket, or below one
    of `allow`; others are counted as failures (`place_not_allowed`). Web addresses have rules of their own
    (`fetch.web`).
    """

    types = SOURCES
    default_type = "table"

    url: str  # where the inputs are listed
    allow: tuple[str, ...] = ()  # further folders and s3:// prefixes that rows may name

    def open(self) -> Source:
        """The source that these options describe; nothing is read yet."""
        raise NotImplementedError

    @property
    def names_splits(self) -> bool:
        """Whether the source says which split an input belongs to."""
        return False

    @property
    def has_captions(self) -> bool:
        """Whether inputs have captions."""
        return False

    @property
    def has_labels(self) -> bool:
        """Whether inputs have labels."""
        return False

    def with_text(self, row: Mapping[str, Any], text: bytes) -> Mapping[str, Any]:
        """A row of `base.SCHEMA` with the text of the object that its column `sidecar` names.

        Raises:
            Refused: the object isn't in the expected format.
        """
        return row
