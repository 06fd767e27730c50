"""Reading source images: a size cap, retries, several reads at once, results in order.

A place that fails as a whole (an outage, credentials that ran out) stops the build, which a rerun then finishes;
it is never booked as failed inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from data_prep.account import Refused
from data_prep.config import FetchConfig
from data_prep.sources import Places
from pipeline import storage
from pipeline.errors import StorageError


def fetch(raw_url: bytes | None, places: Places, options: FetchConfig) -> bytes:
    """The bytes a row's URL stands for.

    Raises:
        Refused: the row's own fault.
        StorageError: the place can't be used at all.
    """
    url = places.resolve(raw_url)
    try:
        return storage.retrying(
            lambda: _read_capped(url, options.max_bytes),
            transient=lambda error: isinstance(error, storage.StorageUnavailable),
            attempts=options.retries + 1,
            first_wait_s=0.5,
        )
    except FileNotFoundError:
        raise Refused("not_found", f"nothing at {url}") from None
    except storage.StorageUnavailable:
        raise
    except StorageError as error:
        # A refusal concerns this object alone as long as the same credentials still open the table itself.
        if storage.is_remote(url):
            if places.witness is None:
                raise
            storage.size_bytes(places.witness)
        raise Refused("read_refused", f"{url}: {error.what}") from error


def fetch_all(raw_urls: Sequence[bytes | None], places: Places, options: FetchConfig) -> Iterator[bytes | Refused]:
    """The bytes of each URL in order, or why not, `options.concurrency` reads running ahead.

    Raises:
        StorageError: a place can't be used at all.
    """
    with ThreadPoolExecutor(options.concurrency, thread_name_prefix="fetch") as pool:
        ahead: deque[Future[bytes | Refused]] = deque()
        urls = iter(raw_urls)
        try:
            for raw_url in urls:
                ahead.append(pool.submit(_fetch_or_refuse, raw_url, places, options))
                if len(ahead) > options.concurrency:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _fetch_or_refuse(raw_url: bytes | None, places: Places, options: FetchConfig) -> bytes | Refused:
    try:
        return fetch(raw_url, places, options)
    except Refused as refused:
        return refused


def _read_capped(url: str, max_bytes: int) -> bytes:
    # One byte more than allowed tells an object that is too large without reading the rest of it.
    data = storage.read_range(url, 0, max_bytes + 1)
    if len(data) > max_bytes:
        raise Refused("too_many_bytes", f"{url} is larger than {max_bytes} bytes")
    return data
