"""Pictures from the hosts that an operator named, fetched here so that no engine ever fetches anything.

A name is resolved once for each connection; every address it has must be a public one, and the connection goes to
one of those, so a name that changes its mind gains nothing. The certificate is checked against the name. A URL is
taken apart in one place, by a pattern without room for user-info, backslashes or fragments, and only its parts are
used from there on. Redirects are followed by hand and are URLs like any other. httpcore knows no proxies of the
environment and no cookies.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urljoin

import httpcore

from nexus.errors import InvalidRequest
from nexus.images import FORMATS, MOST_BYTES, Picture
from nexus.types import media_type_of

MOST_REDIRECTS = 3
MOST_SECONDS = 10.0  # for one picture, its redirects included
MOST_URL = 2048  # characters
HTTPS_PORT = 443
REDIRECTS = frozenset({301, 302, 303, 307, 308})

_URL = re.compile(
    r"https://([a-z0-9.\-]{1,253})(?::([0-9]{1,5}))?((?:/[\w.~!$&'()*+,;=:@%/\-]*)?(?:\?[\w.~!$&'()*+,;=:@%/?\-]*)?)",
    re.ASCII | re.IGNORECASE,
)
_HEADERS = [("Accept", ", ".join(FORMATS)), ("Accept-Encoding", "identity"), ("User-Agent", "nexus")]
_GLOBAL_UNICAST = IPv6Network("2000::/3")  # NAT64 and every form that maps an IPv4 address but two is outside of it

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Every address of a name. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(place[4][0]) for place in found]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet's, and none that leads to another one inside of it."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return ip.is_global and not ip.is_multicast
    return _is_public_v6(ip)


def _is_public_v6(ip: IPv6Address) -> bool:
    leads_elsewhere = ip.scope_id or ip.ipv4_mapped or ip.sixtofour or ip.teredo
    return ip in _GLOBAL_UNICAST and ip.is_global and not ip.is_multicast and not leads_elsewhere


@dataclass(frozen=True, slots=True)
class _Place:
    """A URL's parts: a lower-case host, its port, and what is asked of it."""

    host: str
    port: int
    target: str


def _parse(url: str) -> _Place | None:
    """The parts of an https URL; None for anything else."""
    found = _URL.fullmatch(url) if len(url) <= MOST_URL else None
    if found is None:
        return None
    host, port, target = found.groups()
    return _Place(host.lower(), int(port or HTTPS_PORT), target if target.startswith("/") else f"/{target}")


class _NotAllowed(Exception):
    """A URL, or what its name leads to, is none that may be asked."""


class _Failed(Exception):
    """Why the server's answer is not taken."""


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to an address of a name, if all of them are public."""

    def __init__(self, network: httpcore.AsyncNetworkBackend, resolve: Resolve) -> None:
        self._network, self._resolve = network, resolve

    async def connect_tcp(self, host: str, port: int, *options: Any, **named: Any) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise _NotAllowed
        return await self._network.connect_tcp(addresses[0], port, *options, **named)


class ImageHosts:
    """The hosts whose pictures may be fetched: `name`, for its port 443, or `name:port`. By default none."""

    def __init__(
        self, hosts: Iterable[str] = (), *, certificates: ssl.SSLContext | None = None, resolve: Resolve = resolve,
        network: httpcore.AsyncNetworkBackend | None = None, seconds: float = MOST_SECONDS,
    ) -> None:  # fmt: skip
        """`certificates` are those to trust, by default the usual authorities'; the network is asyncio's."""
        self._hosts = frozenset(host if ":" in host else f"{host}:{HTTPS_PORT}" for host in hosts)
        self._certificates = certificates or (httpcore.default_ssl_context() if self._hosts else None)
        self._network = _CheckedNetwork(network or httpcore.AnyIOBackend(), resolve)
        self._seconds = seconds

    async def fetch(self, url: str) -> Picture:
        """The picture at a URL, not verified. Raises InvalidRequest, with the code `url_not_allowed`."""
        shown = repr(url[:50])
        try:
            async with asyncio.timeout(self._seconds):
                return await self._follow(url)
        except _NotAllowed:
            why = f"no picture is fetched from {shown}: give it as a data: URL, or an https URL of an allowed host"
        except TimeoutError:
            why = f"the picture at {shown} did not come within {self._seconds:g} s; give it as a data: URL"
        except _Failed as failure:
            why = f"the picture at {shown} is not taken: {failure}; give it as a data: URL"
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError, UnicodeError):
            why = f"the picture at {shown} cannot be fetched; give it as a data: URL"
        raise InvalidRequest(why, code="url_not_allowed")

    async def _follow(self, url: str) -> Picture:
        for _ in range(1 + MOST_REDIRECTS):
            place = _parse(url)
            if place is None or f"{place.host}:{place.port}" not in self._hosts:
                raise _NotAllowed
            answer = await self._ask(place)
            if isinstance(answer, Picture):
                return answer
            try:
                url = urljoin(url, answer)
            except ValueError:
                raise _NotAllowed from None
        raise _Failed(f"there are more than {MOST_REDIRECTS} redirects")

    async def _ask(self, place: _Place) -> Picture | str:
        """One request: the picture, or where the server says it is."""
        url = httpcore.URL(scheme="https", host=place.host, port=place.port, target=place.target)
        async with (
            httpcore.AsyncConnectionPool(self._certificates, network_backend=self._network) as pool,
            pool.stream("GET", url, headers=_HEADERS) as response,
        ):
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in REDIRECTS and "location" in headers:
                return headers["location"]
            if response.status != 200:
                raise _Failed(f"its server answers with status {response.status}")
            media_type = media_type_of(headers.get("content-type"))
            if media_type not in FORMATS or headers.get("content-encoding", "identity").lower() != "identity":
                raise _Failed(f"its server does not say that it is one of {', '.join(FORMATS)}")
            content = bytearray()
            async for data in response.aiter_stream():
                content += data
                if len(content) > MOST_BYTES:
                    raise _Failed(f"it has more than {MOST_BYTES // 2**20} MiB")
            return Picture(media_type, bytes(content))
