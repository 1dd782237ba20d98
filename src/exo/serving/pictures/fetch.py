"""Fetches pictures from hosts that the operator allows, and from no address of a private network."""

import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast
from urllib.parse import urljoin, urlsplit

import anyio
import httpcore

_MOST_BYTES = 16 << 20
_SECONDS = 20.0
_REDIRECTS = 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(Exception):
    """A picture was not fetched. The message names the reason and nothing of the network behind the server."""


async def fetch(url: str, hosts: Sequence[str], admits: Callable[[str], bool] | None = None) -> bytes:
    """Returns the content of an address, after up to three redirects to allowed hosts. Raises FetchError.

    ``hosts`` have a port unless it is the usual one. ``admits`` decides about IP addresses; None admits public ones.
    """
    try:
        with anyio.fail_after(_SECONDS):
            network = _CheckedNetwork(admits or is_public)
            async with httpcore.AsyncConnectionPool(network_backend=network) as pool:
                for _ in range(1 + _REDIRECTS):
                    content, location = await _get(pool, _checked(url, hosts))
                    if location is None:
                        return content
                    url = urljoin(url, location)
    except TimeoutError:
        raise FetchError(f"the picture did not come within {_SECONDS:g} s") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError, ValueError):
        raise FetchError("the picture cannot be fetched") from None
    raise FetchError(f"the address leads to more than {_REDIRECTS} others")


def _checked(url: str, hosts: Sequence[str]) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.username is not None:
        raise FetchError("the address must begin with http:// or https:// and have no user")
    if not hosts:
        raise FetchError("this server fetches no pictures; send the picture itself as a data: URL")
    if f"{parts.hostname}{f':{parts.port}' if parts.port is not None else ''}" not in hosts:
        raise FetchError(f"this server fetches pictures from {', '.join(hosts)} only")
    return url


async def _get(pool: httpcore.AsyncConnectionPool, url: str) -> tuple[bytes, str | None]:
    """Returns the content, or the address to which a redirect leads."""
    async with pool.stream("GET", url, headers={"accept": "image/*", "user-agent": "exo"}) as response:
        headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
            return b"", headers[b"location"]
        if response.status != 200:
            raise FetchError(f"the host answers with status {response.status}")
        content = bytearray()
        async for piece in response.aiter_stream():
            content += piece
            if len(content) > _MOST_BYTES:
                raise FetchError(f"the picture has more than {_MOST_BYTES:,} bytes")
        return bytes(content), None


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to the IP address that it has checked, so that a second look-up of the name cannot change it."""

    def __init__(self, admits: Callable[[str], bool]) -> None:
        self._admits = admits
        # httpcore declares a second class of this name for an environment without AnyIO.
        self._backend = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises FetchError if one of the name's addresses is not admitted."""
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]) for each in found]
        if not addresses or not all(map(self._admits, addresses)):
            raise FetchError("the host has an address of a private network")
        return await self._backend.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also if IPv6 wraps an IPv4 address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(found.packed[-4:])
        found = inner or found
    return found.is_global and not found.is_multicast
