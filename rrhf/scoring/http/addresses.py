"""Decides which address of a server may be connected to.

A scorer's URL may come from a settings file that somebody else wrote, so it must not reach whatever
this machine can reach. Without `--scorer_hosts`, only this machine itself is allowed. The host is
resolved once, every address that the name has is checked, and all connections go to the address
that was checked: a name that changes its address later (DNS rebinding) changes nothing. IP
addresses in unusual spellings (0x7f.1, 2130706433) are refused. Standard library only.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from rrhf.errors import UserError

Resolver = Callable[[str, int], Sequence[str]]
"""Takes a host and a port; returns its IP addresses, the preferred one first."""

_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_PORTS = {"http": 80, "https": 443}
_EMBEDDING = tuple(map(ip_network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")))
"""IPv6 networks that stand for IPv4 addresses: NAT64, compatible, translated."""
_METADATA = ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
"""Metadata services of clouds that are not link-local."""


@dataclass(frozen=True)
class Address:
    """A URL, checked.

    Attributes:
        scheme: "http" or "https".
        host: lower case; an IPv6 address without brackets.
        port: the port, also where the URL has none.
        path: path and query.
        is_own: whether the host is this machine by its loopback address.
    """

    scheme: str
    host: str
    port: int
    path: str
    is_own: bool

    @property
    def url(self) -> str:
        """The URL, with the port if it is not the scheme's."""
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def parse_address(url: str, hosts: Sequence[str] = ()) -> Address:
    """Check a URL; nothing is resolved yet.

    Args:
        url: http or https.
        hosts: hosts that are allowed in addition to this machine.

    Raises:
        UserError: the URL is malformed, or its host is not allowed.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"{url}: is not a URL ({error}); write http://HOST:PORT/PATH") from error
    if parts.scheme not in _PORTS or not parts.hostname or not url.isascii() or " " in url:
        raise UserError(f"{url}: is not a URL of a server; write http://HOST:PORT/PATH")
    if "@" in parts.netloc:
        raise UserError(
            f"{parts.scheme}://...@{parts.hostname}: holds a password, which would end up in logs; "
            "put it into an environment variable and name that: #token_env=NAME"
        )
    host = parts.hostname.rstrip(".").lower()
    ip = _ip(host)
    if ip is None and (_NUMBER.fullmatch(host.rpartition(".")[2]) or not _NAME.fullmatch(host)):
        raise UserError(
            f"{url}: {host!r} is neither a name nor an IP address in its usual form, such as "
            "127.0.0.1 or [::1]"
        )
    is_own = host == "localhost" or (ip is not None and ip.is_loopback)
    if not is_own and host not in {one.strip("[]").rstrip(".").lower() for one in hosts}:
        raise UserError(
            f"{url}: prompts and responses would be sent to {host}, which is not this machine; if "
            f"that is what you want, add --scorer_hosts {host}"
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.scheme, host, port or _PORTS[parts.scheme], path, is_own)


def resolved(address: Address, resolver: Resolver | None = None) -> list[str]:
    """Return the IP addresses to connect to, the preferred one first.

    Raises:
        UserError: the host is unknown, or one of its addresses must not be connected to: one of
            this machine for the name of another, or one that is no server's (link-local, multicast,
            unspecified, reserved, a metadata service of clouds), also in an IPv6 address that
            stands for an IPv4 one.
    """
    try:
        found = list((resolver or system_resolver)(address.host, address.port))
    except OSError as error:
        raise UserError(
            f"{address.url}: the host is unknown ({error.strerror or error})"
        ) from error
    if not found:
        raise UserError(f"{address.url}: the host has no address")
    for text in found:
        ip = _ip(text)
        inner = None if ip is None else _inner(ip)
        if (
            ip is None
            or inner is None
            or {ip.is_loopback, inner.is_loopback} != {address.is_own}
            or _is_no_server(inner)
        ):
            what = "is not this machine's" if address.is_own else "must not be connected to"
            raise UserError(
                f"{address.url}: {address.host} has the address {text}, which {what}; name the "
                "server's own address"
            )
    return found


def system_resolver(host: str, port: int) -> list[str]:
    """Resolve a host as the system does."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _inner(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the IPv4 address that an IPv6 address stands for; else the address itself."""
    if isinstance(ip, IPv4Address) or ip.is_loopback or ip.is_unspecified:
        return ip
    if any(ip in network for network in _EMBEDDING):
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)


def _is_no_server(ip: IPv4Address | IPv6Address) -> bool:
    is_special = ip.is_link_local or ip.is_multicast or ip.is_unspecified or str(ip) in _METADATA
    return is_special or (ip.is_reserved and not ip.is_loopback)


def _ip(text: str) -> IPv4Address | IPv6Address | None:
    """Parse an IP address in its usual form; an IPv4 address inside an IPv6 one is unwrapped."""
    try:
        ip = ip_address(text)
    except ValueError:
        return None
    inner = getattr(ip, "ipv4_mapped", None)
    return inner or ip
