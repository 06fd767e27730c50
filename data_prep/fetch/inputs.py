"""Reading source images: a size cap, retries, many reads at once, results as they come.

A store that fails as a whole (an outage, expired credentials) stops the build, which a rerun then finishes; it is never
counted as failed inputs. The failure of a web server concerns its own URLs only: see `data_prep.fetch.web`.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from data_prep.account import Refused
from data_prep.config import FetchConfig
from data_prep.fetch.web import WebReader, is_web
from data_prep.sources.base import AllowedPlaces, Input
from pipeline import storage
from pipeline.errors import StorageError

_MAX_SIDECAR_BYTES = 2**20


class FetchRequest(NamedTuple):
    """What is to be read of one input; fields as in `sources.base.SCHEMA`."""

    url: bytes | None
    held: bytes | None = None
    start: int | None = None
    stop: int | None = None
    sidecar: bytes | None = None

    @classmethod
    def of(cls, row: Input) -> FetchRequest:
        """What is to be read for a row of `sources.base.SCHEMA`."""
        return cls(row["url"], row["held"], row["start"], row["stop"], row["sidecar"])


class Fetched(NamedTuple):
    """What was read of one input."""

    data: bytes
    sidecar: bytes | None = None


Result = Fetched | Refused


def fetch_all(
    wanted: Sequence[FetchRequest], places: AllowedPlaces, options: FetchConfig, *, tasks_at_once: int = 1
) -> Iterator[tuple[int, Result]]:
    """(index, what was read or why not) of each, in the order of arrival: an input that hangs delays no other.

    Args:
        tasks_at_once: how many tasks like this one share the limits per host.

    Raises:
        StorageError: a store can't be used at all.
    """
    done: queue.SimpleQueue[tuple[int, Future[Result] | Future[bytes | Refused]]] = queue.SimpleQueue()
    next_up = iter(enumerate(wanted))
    under_way = 0
    exhausted = False
    with (
        ThreadPoolExecutor(min(options.concurrency, max(1, len(wanted))), thread_name_prefix="fetch") as pool,
        WebReader(options, tasks_at_once) as web,
    ):

        def begin(index: int, item: FetchRequest) -> None:
            if item.held is None and item.sidecar is None and is_web(item.url):
                web.submit(item.url or b"").add_done_callback(lambda finished: done.put((index, finished)))
            else:
                future = pool.submit(_fetch_or_refuse, item, places, options, web)
                future.add_done_callback(lambda finished: done.put((index, finished)))

        try:
            while True:
                while not exhausted and under_way < options.concurrency:
                    index, item = next(next_up, (-1, None))
                    if item is None:
                        exhausted = True
                        break
                    begin(index, item)
                    under_way += 1
                if not under_way:
                    return
                index, future = done.get()
                under_way -= 1
                result = future.result()
                yield index, Fetched(result) if isinstance(result, bytes) else result
        finally:
            web.cancel()
            pool.shutdown(wait=False, cancel_futures=True)


def fetch(item: FetchRequest, places: AllowedPlaces, options: FetchConfig) -> Fetched:
    """Read one input.

    Raises:
        Refused: the input can't be read.
        StorageError: the store can't be used at all.
    """
    for _, result in fetch_all([item], places, options):
        if isinstance(result, Refused):
            raise result
        return result
    raise AssertionError("unreachable")


def _fetch_or_refuse(item: FetchRequest, places: AllowedPlaces, options: FetchConfig, web: WebReader) -> Result:
    try:
        sidecar = None
        if item.sidecar is not None:
            sidecar = _read(places.resolve(item.sidecar), places, options, stop=_MAX_SIDECAR_BYTES)
        if item.held is not None:
            held = item.held.decode("utf-8", "surrogateescape")
            return Fetched(_read(held, places, options, item.start or 0, item.stop), sidecar)
        if is_web(item.url):
            body = web.submit(item.url or b"").result()
            return body if isinstance(body, Refused) else Fetched(body, sidecar)
        return Fetched(_read(places.resolve(item.url), places, options), sidecar)
    except Refused as refused:
        return refused


def _read(url: str, places: AllowedPlaces, options: FetchConfig, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes of an object in a store, at most `options.max_bytes` of them."""
    size = options.max_bytes if stop is None else stop - start
    if size > options.max_bytes:
        raise Refused("too_many_bytes", f"{url}: {size} bytes, more than {options.max_bytes}")

    def read() -> bytes:
        # One byte more than allowed shows that an object is too large, without reading the rest of it.
        return storage.read_range(url, start, start + size + (stop is None))

    try:
        data = storage.retrying(
            read,
            transient=lambda error: isinstance(error, storage.StorageUnavailable),
            attempts=options.retries + 1,
            first_wait_s=0.5,
        )
    except FileNotFoundError:
        raise Refused("not_found", f"nothing at {url}") from None
    except storage.StorageUnavailable:
        raise
    except StorageError as error:
        # The refusal concerns this object alone as long as the same credentials can still read the listing itself.
        if storage.is_remote(url):
            if places.witness is None:
                raise
            storage.size_bytes(places.witness)
        raise Refused("read_refused", f"{url}: {error.what}") from error
    if stop is None and len(data) > options.max_bytes:
        raise Refused("too_many_bytes", f"{url} is larger than {options.max_bytes} bytes")
    return data
