"""Objects of an S3 server: a client for each process and environment, which errors are retried, and what they mean."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from pipeline.errors import StorageError
from pipeline.storage.retries import retrying
from pipeline.storage.store import Data, Entry, StorageUnavailable

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
PART_SIZE_BYTES = 16 * 2**20  # objects of two parts and more are uploaded in parts
_MAX_COPY_BYTES = 5 * 10**9  # the protocol's limit on a copy in one request
MAX_PARTS = 9_000  # the protocol allows 10,000
_PIECE_BYTES = 2**20  # of a body, received at once
_SMALL_PIECE_BYTES = 2**16  # once a body has broken off, so that little of what did arrive is lost
# botocore doesn't ask again for a body that breaks off, so all of that falls to these: where a twentieth of all bodies
# breaks off, three tries lose one read in 8000, six one in 60 million.
_ATTEMPTS = 6

# What may pass by itself; everything else is an answer.
_TRANSIENT_CODES = frozenset(
    {
        *("SlowDown", "ServiceUnavailable", "InternalError", "InternalFailure", "RequestTimeout", "Throttling"),
        *("ThrottlingException", "RequestThrottled", "RequestLimitExceeded", "TooManyRequests", "OperationAborted"),
        *("ConditionalRequestConflict", "408", "409", "429", "500", "502", "503", "504"),
    }
)
_REFUSED_CODES = frozenset(
    {
        *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403"),
        *("TokenRefreshRequired", "RequestTimeTooSkewed", "AuthorizationHeaderMalformed", "AccountProblem"),
        *("InvalidSecurity", "MissingSecurityHeader"),
    }
)
_EXISTS_CODES = frozenset({"PreconditionFailed", "412"})


class S3Objects:
    """Objects of an S3 server, through one s3fs instance of this process. Their content is read by botocore's blocking
    client, which takes two thirds of s3fs' processor time and holds the interpreter's lock for little of it.
    """

    def __init__(self) -> None:
        # botocore otherwise asks for whole-object checksums, which ranged reads of some servers can't pass.
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        import botocore.session
        import s3fs
        from botocore.config import Config

        # Own servers are rarely reached by bucket.host names.
        own_server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        settings: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": 32,
            "retries": {"mode": "standard", "total_max_attempts": 4},
            **({"s3": {"addressing_style": "path"}} if own_server else {}),
        }
        self._fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=settings)
        self._client = botocore.session.get_session().create_client("s3", config=Config(**settings))
        self._fs.retries = 1  # botocore retries single requests, `retrying` whole calls
        self._known_buckets: set[str] = set()

    def read(self, url: str) -> bytes:
        return self._received(url, 0, None)

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        return self._received(url, start, stop)

    def _received(self, url: str, start: int, stop: int | None) -> bytes:
        """Bytes [start, stop), to the end without `stop`.

        A body that breaks off is resumed at the byte where it broke; only attempts without progress count.
        """
        bucket, key = _bucket_and_key(url)
        pieces: list[bytes] = []
        received, tag, piece_size = 0, "", _PIECE_BYTES

        def go_on() -> None:
            nonlocal received, tag, piece_size
            end = "" if stop is None else stop - 1
            part = {} if start + received == 0 and stop is None else {"Range": f"bytes={start + received}-{end}"}
            reply = self._client.get_object(Bucket=bucket, Key=key, **part)
            with contextlib.closing(reply["Body"]) as body:
                if part and not reply.get("ContentRange"):  # the whole, though a part was asked for
                    if stop is not None:
                        raise StorageError(
                            "the server ignores byte ranges", where=url, fix="keep the data in a store that serves them"
                        )
                    pieces.clear()
                    received = 0
                elif tag not in ("", reply.get("ETag", "")):  # another object stands there now: none of it may be mixed
                    pieces.clear()
                    received, tag = 0, ""
                    raise ConnectionError("the object changed while it was read")
                tag, size, piece_size = reply.get("ETag", ""), piece_size, _SMALL_PIECE_BYTES
                while piece := body.read(size):
                    pieces.append(piece)
                    received += len(piece)

        while True:
            before = received
            try:
                self._call(url, go_on)
                break  # as much as there is
            except _RangeBeyondEnd:
                break
            except StorageUnavailable:
                if received <= before:
                    raise
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, url: str, data: Data) -> None:
        self._call(url, lambda: self._put(url, data, "overwrite"))

    def create(self, url: str, data: Data) -> bool:
        # Servers that ignore If-None-Match at least get this check.
        if self.size_bytes(url) is not None:
            return False
        if self.create_conditionally(url, data):
            return True
        # Nothing was there a moment ago: another writer's, or ours, whose reply was lost and which was sent again (by
        # aiohttp too, unseen from here).
        return self.size_bytes(url) == len(data) and self.read(url) == data

    def create_conditionally(self, url: str, data: Data) -> bool:
        """Create the object unless one is there; returns whether the server accepted it."""

        def put() -> bool:
            try:
                self._put(url, data, "create")
            except Exception as error:
                if _response(error).get("Error", {}).get("Code") in _EXISTS_CODES:
                    return False
                raise
            return True

        return bool(self._call(url, put))

    def size_bytes(self, url: str) -> int | None:
        bucket, key = _bucket_and_key(url)
        try:
            head = self._call(url, lambda: self._fs.call_s3("head_object", Bucket=bucket, Key=key))
            return int(head["ContentLength"])
        except FileNotFoundError:
            return None

    def entries(self, url: str) -> Iterator[Entry]:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        prefix = key.rstrip("/") + "/" if key.rstrip("/") else ""
        token: dict[str, str] = {}

        def list_page() -> Any:
            return self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **token)

        while True:
            page = self._call(url, list_page)
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # folder markers
                    yield Entry(f"s3://{bucket}/{item['Key']}", int(item["Size"]), str(item.get("ETag", "")).strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, url: str) -> None:
        bucket, key = _bucket_and_key(url)
        with contextlib.suppress(FileNotFoundError):
            self._call(url, lambda: self._fs.call_s3("delete_object", Bucket=bucket, Key=key))

    def move(self, source: str, target: str) -> None:
        from_bucket, from_key = _bucket_and_key(source)
        bucket, key = _bucket_and_key(target)
        origin = {"Bucket": from_bucket, "Key": from_key}
        if (self.size_bytes(source) or 0) > _MAX_COPY_BYTES:
            self._call(source, lambda: self._fs.cp_file(f"{from_bucket}/{from_key}", f"{bucket}/{key}"))
        else:
            copy = functools.partial(self._fs.call_s3, "copy_object", Bucket=bucket, Key=key, CopySource=origin)
            self._call(source, copy)
        self.delete(source)

    def abort_uploads(self, url: str) -> int:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        prefix = key.rstrip("/") + "/"
        listed = functools.partial(self._fs.call_s3, "list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        try:
            uploads = self._call(url, listed).get("Uploads", ())
        except (StorageError, FileNotFoundError):
            return 0  # not every store lists them
        for upload in uploads:
            abort = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            with contextlib.suppress(FileNotFoundError, StorageError):  # finished or given up meanwhile
                self._call(url, functools.partial(self._fs.call_s3, "abort_multipart_upload", **abort))
        return len(uploads)

    def _put(self, url: str, data: Data, mode: str) -> None:
        bucket, key = _bucket_and_key(url)
        part_size = max(PART_SIZE_BYTES, -(-len(data) // MAX_PARTS))
        # A multipart upload that fails is aborted by s3fs.
        self._fs.pipe_file(f"{bucket}/{key}", bytes(data), chunksize=part_size, mode=mode)

    def _call(self, url: str, call: Callable[[], Any]) -> Any:
        try:
            return retrying(call, transient=_is_transient, attempts=_ATTEMPTS)
        except Exception as error:
            self._raise_explained(url, error)

    def _raise_explained(self, url: str, error: Exception) -> NoReturn:
        """Raise what `error` of a client call means to the caller."""
        response = _response(error)
        code = response.get("Error", {}).get("Code", "")
        bucket = url.removeprefix("s3://").partition("/")[0]
        server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        if code in ("NoSuchBucket", "NoSuchKey", "404"):
            # A HEAD's 404 has no body that would say which of the two is missing.
            if code == "NoSuchBucket" or (code == "404" and not self._bucket_exists(bucket)):
                raise StorageError(
                    f"no bucket {bucket!r} on {server}", where=url, fix="create it, or mend the URL or AWS_ENDPOINT_URL"
                ) from error
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
        if code in ("InvalidRange", "416"):
            raise _RangeBeyondEnd from error
        if code in _REFUSED_CODES or isinstance(error, PermissionError):
            raise StorageError(
                f"{server} refused the credentials or the permission ({code or error})",
                where=url,
                fix="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and the bucket's policy",
            ) from error
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"):
            raise StorageError(
                f"no usable credentials ({error})",
                where=url,
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or use an instance role",
            ) from error
        if _is_transient(error) or _is_unreachable(error):
            raise StorageUnavailable(
                f"{server} can't be reached or is too busy ({' '.join(str(error).split())})",
                where=url,
                fix="check AWS_ENDPOINT_URL and the network, then run it again",
            ) from error
        if isinstance(error, OSError) or response or type(error).__module__.startswith(("botocore", "aiobotocore")):
            raise StorageError(
                f"{server} answered {code or name}: {' '.join(str(error).split())}",
                where=url,
                fix="check the URL and the server",
            ) from error
        raise error

    def _bucket_exists(self, bucket: str) -> bool:
        if bucket not in self._known_buckets:
            try:
                head = functools.partial(self._fs.call_s3, "head_bucket", Bucket=bucket)
                retrying(head, transient=_is_transient, attempts=_ATTEMPTS)
            except FileNotFoundError:
                return False
            except Exception as error:
                self._raise_explained(f"s3://{bucket}", error)
            self._known_buckets.add(bucket)
        return True


class _RangeBeyondEnd(Exception):  # noqa: N818
    """A ranged read starts where the object has ended."""


_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
)
_clients: dict[tuple[object, ...], S3Objects] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    """A fork may happen while another thread holds the lock; that thread isn't there to release it in the child."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def client() -> S3Objects:
    """The client of this process and of the environment as it is now."""
    key = _client_key()
    existing = _clients.get(key)
    if existing is None:
        with _lock:
            existing = _clients.get(key)
            if existing is None:
                existing = _clients[key] = S3Objects()
    return existing


def _client_key() -> tuple[object, ...]:
    """What a client depends on: the process, and the environment's endpoint and credentials.

    A client is never carried over a fork (its event loop's thread isn't), nor used after the environment changed.
    """
    return (os.getpid(), *(os.environ.get(name) for name in _VARIABLES))


def _bucket_and_key(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise StorageError("names no object", where=url, fix="give s3://bucket/key")
    return bucket, key


def _response(error: BaseException) -> dict[str, Any]:
    """The server's answer behind an exception of s3fs, {} when there was none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return response
        seen = seen.__cause__
    return {}


def _is_transient(error: Exception) -> bool:
    """Whether the same call may succeed in a moment."""
    if isinstance(error, (StorageError, FileNotFoundError, PermissionError)):
        return False
    response = _response(error)
    if response:
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return response.get("Error", {}).get("Code") in _TRANSIENT_CODES or status in (429, 500, 502, 503, 504)
    if _is_unreachable(error):
        return False  # botocore has waited already
    kinds = {cls.__name__ for cls in type(error).__mro__}
    names = {"HTTPClientError", "ClientPayloadError", "IncompleteReadError", "ResponseParserError", "FSTimeoutError"}
    names |= {"ProtocolError", "ReadTimeoutError"}  # urllib3's, of the body of an error, which botocore passes on as is
    return bool(kinds & names) or isinstance(error, (ConnectionError, TimeoutError))


def _is_unreachable(error: Exception) -> bool:
    kinds = {cls.__name__ for cls in type(error).__mro__}
    return bool(kinds & {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "SSLError"})
