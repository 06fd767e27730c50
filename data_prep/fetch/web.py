"""Reading from the web on behalf of tables that come from strangers.

Rules: names are resolved here, once, and the connection goes to the address that was checked, so that a name can't
resolve to a public address first and to an internal one later. Private, loopback, link-local, multicast and reserved
addresses are refused (`address_not_allowed`), also where IPv6 wraps an IPv4 address, and again at every redirect; so
are ports other than the web's, and every scheme but http and https. Cookies, proxies and credentials of this machine's
environment are not used. One deadline covers an object as a whole: connecting, redirects, retries, waits, and a slow
body.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import random
import socket
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from data_prep.account import Refused
from data_prep.config import FetchConfig

_PIECE_BYTES = 256 * 1024
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_BUSY = frozenset({429, 503})
_LOOKUPS_AT_ONCE = 32
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_web(url: bytes | None) -> bool:
    """Whether a row's URL is a web address."""
    return (url or b"").lstrip()[:8].lower().startswith((b"http://", b"https://"))


class Boundary:
    """Which addresses may be connected to: public ones at the web's ports, and explicitly allowed networks."""

    def __init__(self, networks: tuple[str, ...], ports: tuple[int, ...]) -> None:
        self._networks = tuple(ipaddress.ip_network(network) for network in networks)
        self._ports = ports

    def refusal(self, address: Address, port: int) -> str | None:
        """Why an address may not be connected to; None if it may.

        Addresses that an IPv6 address wraps (IPv4-mapped, NAT64, 6to4, Teredo) are judged too, since it leads there.
        """
        targets = (address, *_wrapped(address))
        if any(target in network for target in targets for network in self._networks):
            return None
        if not all(target.is_global and not target.is_multicast and not target.is_reserved for target in targets):
            return f"{address} is not a public address (fetch.web.allow_networks)"
        if port not in self._ports:
            return f"port {port} isn't one of fetch.web.ports"
        return None


def _wrapped(address: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """IPv4 addresses inside an IPv6 address."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    return tuple(address for address in inner if address is not None)


def opts_out(values: list[str], directives: tuple[str, ...]) -> bool:
    """Whether `X-Robots-Tag` headers hold one of the directives, for all robots or for one that isn't named.

    A directive may follow a robot's name and a colon; like img2dataset, we heed those without a name, and `*`.
    """
    for value in values:
        robot, colon, rest = value.partition(":")
        if colon and "," not in robot:
            if robot.strip() != "*":
                continue
            value = rest
        if any(word.strip().lower() in directives for word in value.split(",")):
            return True
    return False


def retry_after_s(value: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or a date (RFC 9110, 10.2.3); None: no valid value."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        return None


class _AddressRefusedError(OSError):
    """A name has no address that may be connected to."""


class _TryAgain(Exception):  # noqa: N818 -- no error yet
    """An attempt failed, and another may succeed."""

    def __init__(self, refused: Refused, wait_s: float | None = None) -> None:
        super().__init__(refused.message)
        self.refused = refused
        self.wait_s = wait_s


class WebReader:
    """Reads web addresses in an event loop of its own, which starts with the first one and ends with the context.

    Args:
        tasks_at_once: how many such readers share the limit per host.
    """

    def __init__(self, options: FetchConfig, tasks_at_once: int = 1) -> None:
        self._options = options
        self._per_host = max(1, options.web.per_host // tasks_at_once)
        self._boundary = Boundary(options.web.allow_networks, options.web.ports)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._session: aiohttp.ClientSession | None = None
        self._lookups: ThreadPoolExecutor | None = None
        self._hosts: dict[str, asyncio.Semaphore] = {}
        self._quiet_until: dict[str, float] = {}  # until when a host asked not to be called
        self._lock = threading.Lock()

    def __enter__(self) -> WebReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def submit(self, url: bytes) -> Future[bytes | Refused]:
        """Start to read a web address; the future's result is its content, or the refusal."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="web", daemon=True)
                self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._get_or_refuse(url), self._loop)

    def cancel(self) -> None:
        """Cancel the reads under way and end the loop."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        if self._lookups is not None:
            self._lookups.shutdown(wait=False, cancel_futures=True)

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _get_or_refuse(self, raw: bytes) -> bytes | Refused:
        try:
            url = _decoded(raw)
            host = urlsplit(url).hostname or ""
            slot = self._hosts.setdefault(host, asyncio.Semaphore(self._per_host))
            async with slot:  # the deadline starts after waiting for a free connection
                return await self._within_deadline(url, host)
        except Refused as refused:
            return refused

    async def _within_deadline(self, url: str, host: str) -> bytes:
        limit_s = self._options.web.timeout_s
        last: Refused | None = None
        try:
            async with asyncio.timeout(limit_s) as deadline:
                for attempt in range(self._options.retries + 1):
                    await self._wait_for_host(host, deadline.when() or 0.0, last)
                    try:
                        return await self._follow(url)
                    except _TryAgain as again:
                        last = again.refused
                        if attempt == self._options.retries:
                            break
                        wait_s = again.wait_s
                        if wait_s is not None:
                            self._quiet_until[host] = max(self._quiet_until.get(host, 0.0), time.monotonic() + wait_s)
                        else:
                            grown = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S)
                            await asyncio.sleep(grown * random.SystemRandom().uniform(0.5, 1.0))
        except TimeoutError:
            what = f"; before that: {last.message}" if last else ""
            raise Refused("timeout", f"{url}: not read within {limit_s:g} s{what}") from None
        assert last is not None
        raise last

    async def _wait_for_host(self, host: str, deadline: float, last: Refused | None) -> None:
        """Wait as long as the host asked for.

        Raises:
            Refused: that is longer than the time left.
        """
        wait_s = self._quiet_until.get(host, 0.0) - time.monotonic()
        if wait_s <= 0:
            return
        if asyncio.get_running_loop().time() + wait_s > deadline:
            raise last or Refused("server_busy", f"{host} asks to wait another {wait_s:.0f} s")
        await asyncio.sleep(wait_s)

    async def _follow(self, url: str) -> bytes:
        """One attempt, following redirects."""
        at = url
        for _ in range(self._options.web.max_redirects + 1):
            self._check(at)
            answer = await self._get(at)
            if not isinstance(answer, str):
                return answer
            at = urljoin(at, answer)
        raise Refused("too_many_redirects", f"{url}: more than {self._options.web.max_redirects} redirects")

    async def _get(self, url: str) -> bytes | str:
        """The body, or where a redirect leads."""
        try:
            async with (await self._opened()).get(url, allow_redirects=False) as reply:
                if reply.status in _REDIRECTS and "Location" in reply.headers:
                    return reply.headers["Location"]
                self._judge(url, reply)
                return await self._body(url, reply)
        except aiohttp.ClientConnectorDNSError as error:
            if isinstance(error.os_error, _AddressRefusedError):
                raise Refused("address_not_allowed", f"{url}: {error.os_error}") from None
            raise _TryAgain(Refused("name_unknown", f"{url}: the host's name can't be resolved")) from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError) as error:
            raise Refused("url_invalid", f"{url}: {error}") from None
        except (aiohttp.ClientError, ConnectionError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            what = f"{url}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise _TryAgain(Refused("connection_failed", what)) from None

    def _judge(self, url: str, reply: aiohttp.ClientResponse) -> None:
        message = f"{url}: {reply.status} {reply.reason}"
        if reply.status in (404, 410):
            raise Refused("not_found", message)
        if reply.status in _PASSING:
            reason = "server_busy" if reply.status in _BUSY else "server_error"
            wait_s = retry_after_s(reply.headers.get("Retry-After"), time.time())
            raise _TryAgain(Refused(reason, message), wait_s)
        if reply.status != 200:
            raise Refused("server_error" if reply.status >= 500 else "read_refused", message)
        if opts_out(reply.headers.getall("X-Robots-Tag", []), self._options.web.opt_out):
            raise Refused("opted_out", f"{url}: its X-Robots-Tag header forbids to use it")

    async def _body(self, url: str, reply: aiohttp.ClientResponse) -> bytes:
        limit = self._options.max_bytes
        too_many = Refused("too_many_bytes", f"{url} is larger than {limit} bytes")
        if (reply.content_length or 0) > limit:
            raise too_many
        pieces = []
        size = 0
        async for piece in reply.content.iter_chunked(_PIECE_BYTES):
            size += len(piece)
            if size > limit:
                raise too_many
            pieces.append(piece)
        data = b"".join(pieces)
        encoding = reply.headers.get("Content-Encoding", "identity").lower()
        if encoding in ("", "identity"):
            return data
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise Refused("read_refused", f"{url}: sent as {encoding!r}, which was not requested")
        try:
            inflater = zlib.decompressobj(47 if "gzip" in encoding else 15)
            data = inflater.decompress(data, limit + 1)  # a decompression bomb stops here
        except zlib.error as error:
            raise Refused("read_refused", f"{url}: damaged {encoding} ({error})") from None
        if len(data) > limit:
            raise too_many
        return data

    def _check(self, url: str) -> None:
        """Raise Refused for URLs that may not be read, whatever their hosts resolve to."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Refused("url_invalid", f"{url}: {error}") from None
        if parts.scheme not in ("http", "https"):
            raise Refused("unsupported_scheme", f"{url}: a redirect to {parts.scheme}:")
        if not host:
            raise Refused("url_invalid", f"{url}: names no host")
        # Hosts that are addresses already don't reach the resolver.
        try:
            literal = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return
        refusal = self._boundary.refusal(literal, port or _PORTS[parts.scheme])
        if refusal is not None:
            raise Refused("address_not_allowed", f"{url}: {refusal}")

    async def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._lookups = ThreadPoolExecutor(_LOOKUPS_AT_ONCE, thread_name_prefix="names")
            connector = aiohttp.TCPConnector(
                limit=0, resolver=_Resolver(self._boundary, self._lookups), ttl_dns_cache=300, family=socket.AF_UNSPEC
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None),  # `_within_deadline` has one for all attempts
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=_PIECE_BYTES,  # with less, reading stops and starts several times for each photo
                headers={"User-Agent": self._options.web.user_agent, "Accept-Encoding": "identity"},
            )
        return self._session


class _Resolver(AbstractResolver):
    """Resolves names to those of their addresses that may be connected to."""

    def __init__(self, boundary: Boundary, pool: ThreadPoolExecutor) -> None:
        self._boundary = boundary
        self._pool = pool

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        addresses = await loop.run_in_executor(
            self._pool, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        )
        usable = []
        refused: set[str] = set()
        for kind, _, protocol, _, place in addresses:
            address = ipaddress.ip_address(str(place[0]).partition("%")[0])
            refusal = self._boundary.refusal(address, port)
            if refusal is None:
                usable.append(
                    ResolveResult(
                        hostname=host,
                        host=str(place[0]),
                        port=port,
                        family=kind,
                        proto=protocol,
                        flags=socket.AI_NUMERICHOST,
                    )
                )
            else:
                refused.add(refusal)
        if not usable:
            raise _AddressRefusedError(f"{host}: {'; '.join(sorted(refused)) or 'no address'}")
        return usable

    async def close(self) -> None:
        """Nothing to close."""


def _decoded(raw: bytes) -> str:
    try:
        url = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise Refused("url_invalid", "the URL isn't UTF-8") from None
    if any(character.isspace() or ord(character) < 32 for character in url):
        url = url.replace(" ", "%20")
        if any(ord(character) <= 32 for character in url):
            raise Refused("url_invalid", f"{url!r} holds control characters")
    try:
        if not urlsplit(url).hostname:
            raise Refused("url_invalid", f"{url}: names no host")
    except ValueError as error:
        raise Refused("url_invalid", f"{url}: {error}") from None
    return url
