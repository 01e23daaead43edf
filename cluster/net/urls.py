"""URLs in requests: a strict parser, and the rules for allowed hosts and addresses.

Nothing here uses the network. The gateway checks the text of a URL, and the fetcher (`cluster.net.fetcher`)
connects to exactly the host that was checked. URLs that two parsers could read differently are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

MAX_URL_CHARS = 4096

_PORTS = {"http": 80, "https": 443}

_URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.IGNORECASE)

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", re.IGNORECASE)

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")

_LOCAL_NAMES = ("localhost", "local", "internal", "svc", "lan", "home.arpa", "test", "invalid", "onion")
"""Endings of names that exist only on private networks."""

_PRIVATE = [
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # Carrier-grade NAT.
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's metadata service.
        "169.254.0.0/16",  # Link-local; most clouds' metadata services.
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays.
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # Multicast, reserved, broadcast.
        # In IPv6 only 2000::/3 is public, except:
        "2001::/23",  # Teredo and other protocols.
        "2001:db8::/32",
        "2002::/16",  # 6to4.
        "3fff::/20",
    )
]

_PUBLIC_V6 = ip_network("2000::/3")


class UrlRefused(ValueError):
    """A URL is not allowed. The message is a sentence and repeats no part of the URL."""


@dataclass(frozen=True, slots=True)
class Url:
    """An http(s) URL: `host` in lower-case ASCII, IPv6 in brackets; `path` and `query` as they were sent.

    `str` leaves out the query, because it holds the signature of a presigned URL. `full` includes it.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @property
    def address(self) -> IPv4Address | IPv6Address | None:
        """The host as an IP address, None if it is a name."""
        try:
            return ip_address(self.host.strip("[]"))
        except ValueError:
            return None

    @property
    def netloc(self) -> str:
        """Host, and port unless it is the scheme's default."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"

    @property
    def target(self) -> str:
        """Path and query, as in a request line."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def full(self) -> str:
        """The whole URL, secrets included."""
        return f"{self.scheme}://{self.netloc}{self.target}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


def parse_url(text: str) -> Url:
    """Parse a URL. Raises `UrlRefused` unless it is a plain http(s) URL with an ordinary host."""
    if len(text) > MAX_URL_CHARS:
        raise UrlRefused(f"A URL must have at most {MAX_URL_CHARS} characters.")
    if not text.isascii() or not text.isprintable() or " " in text or "\\" in text:
        raise UrlRefused("A URL must be printable ASCII without spaces and backslashes.")
    whole = _URL.fullmatch(text)
    if whole is None:
        raise UrlRefused("A URL must start with http:// or https://.")
    scheme, authority, path, query = whole.groups()
    if "@" in authority:
        raise UrlRefused("A URL must not contain a user name or password.")
    parts = _AUTHORITY.fullmatch(authority)
    scheme = scheme.lower()
    port = int(parts[2] or _PORTS[scheme]) if parts else 0
    if parts is None or not 1 <= port <= 65535:
        raise UrlRefused("The URL has no valid host and port.")
    return Url(scheme, _host(parts[1].lower()), port, path or "/", query or "")


def parse_hosts(entries: Collection[str]) -> frozenset[str]:
    """Parse an operator's list of `host` and `host:port`. Raises `ValueError` for anything else."""
    listed = set()
    for entry in entries:
        parts = _AUTHORITY.fullmatch(entry)
        if parts is None:
            raise ValueError(f"not a host or host:port: {entry!r}")
        host = _host(parts[1].lower())
        listed.add(f"{host}:{parts[2]}" if parts[2] else host)
    return frozenset(listed)


def is_listed(url: Url, hosts: Collection[str]) -> bool:
    """Return whether the allow list contains the host of `url`, for every port or for this one."""
    return url.host in hosts or f"{url.host}:{url.port}" in hosts


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is on the public internet. IPv6 forms of IPv4 addresses count as private."""
    if isinstance(address, IPv6Address) and address not in _PUBLIC_V6:
        return False
    return not any(address in network for network in _PRIVATE)


def check_url(url: Url, hosts: Collection[str]) -> None:
    """Raise `UrlRefused` if the text of `url` shows a host or port that is neither public nor allowed."""
    if is_listed(url, hosts):
        return
    if url.port not in _PORTS.values():
        raise UrlRefused("A URL must use port 80 or 443.")
    local = "." not in url.host or url.host.endswith(tuple(f".{name}" for name in _LOCAL_NAMES))
    if not is_public(url.address) if url.address else local:
        raise UrlRefused("The host is not on the public internet.")


def _host(text: str) -> str:
    """Return the canonical form of a host: an address as `ipaddress` writes it, a name unchanged."""
    labels = text.split(".")
    try:
        if text.startswith("["):
            return f"[{IPv6Address(text[1:-1])}]"
        # Resolvers take a host that ends in a number for an address, even 0x7f.1 or 2130706433.
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
            return str(IPv4Address(text))
    except ValueError as error:
        raise UrlRefused("The host is not an address in its usual form.") from error
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise UrlRefused("The host is not a valid name.")
    return text
