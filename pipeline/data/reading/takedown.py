"""Samples that are withdrawn after a data set was built: their slots stay in the order, at weight 0.

A takedown list is a text file, local or on S3, with a sample's key a line; empty lines and lines that begin with `#`
are passed over. Nothing else changes: the order, the other samples and their augmentation are those of a run without
the list, so it may grow in the middle of a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt64

from pipeline import storage
from pipeline.errors import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class Takedown:
    """The keys of withdrawn samples, as 64-bit digests: 8 bytes a key.

    Of n samples and m keys about n * m / 2**64 samples are withdrawn without being meant: one in four thousand runs
    over five billion samples with a million keys.
    """

    digests: UInt64[np.ndarray, " n"] = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))  # rising

    def __len__(self) -> int:
        return len(self.digests)

    def __contains__(self, key: object) -> bool:
        if not len(self.digests) or not isinstance(key, str):
            return False
        digest = np.uint64(_digest(key))
        at = int(np.searchsorted(self.digests, digest))
        return at < len(self.digests) and bool(self.digests[at] == digest)


def read_takedown(url: str) -> Takedown:
    """Read a takedown list.

    Raises:
        DataError: there is none, or it is no UTF-8 text: nothing is withdrawn silently in vain.
        StorageError: the place can't be read.
    """
    try:
        text = storage.read(url).decode("utf-8")
    except FileNotFoundError as error:
        raise DataError("no such takedown list", where=url, fix="mend data.takedown, or remove it") from error
    except UnicodeDecodeError as error:
        raise DataError("the takedown list is no UTF-8", where=url, fix="write one key a line, as UTF-8") from error
    keys = (line.strip() for line in text.splitlines())
    return takedown_of(key for key in keys if key and not key.startswith("#"))


def takedown_of(keys: Iterable[str]) -> Takedown:
    """The list of these keys."""
    digests = np.array(sorted({_digest(key) for key in keys}), dtype=np.uint64)
    return Takedown(digests)


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
