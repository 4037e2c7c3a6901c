"""Which addresses may be asked: https, a host of the source, and an address of the public internet.

Neither the absence of "private" nor the presence of "global" in an address library suffices: one lets shared address
space through, the other multicast and addresses that carry a hidden IPv4 address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from danlu.papers.net.errors import Refused

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
#: Inside global unicast, but a tunnel to some IPv4 address, or for examples and benchmarks.
_TUNNELS = tuple(
    ipaddress.ip_network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16")
)
_RELAYS = tuple(
    ipaddress.ip_network(text) for text in ("192.88.99.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.175.48.0/24")
)


def check_url(url: str, hosts: Collection[str]) -> SplitResult:
    """Refuse an address that is not on a source's own hosts.

    Args:
        url: to be asked, or where a redirect points.
        hosts: that the source has, in lower case.

    Returns:
        The parts of the address.

    Raises:
        Refused: another scheme than https, user information, another port, or a host that is not one of ``hosts``.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii").lower()
    except (ValueError, UnicodeError) as error:
        raise Refused(f"not an address: {url[:200]!r}") from error
    if any(ord(character) <= 32 or ord(character) == 127 or character == "\\" for character in url):
        raise Refused(f"an address must not hold spaces or control characters: {url[:200]!r}")
    if parts.scheme != "https":
        raise Refused(f"only https may be asked, got {url[:200]!r}")
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise Refused(f"an address with user information is refused: {host}")
    if port not in (None, 443):
        raise Refused(f"only the default port may be asked, got {port} of {host}")
    if host not in hosts:
        raise Refused(f"host {host!r} is not one of this source: {', '.join(sorted(hosts))}")
    return parts


def is_public(address: str) -> bool:
    """Whether an IP address is an ordinary one of the public internet, with whatever it hides inside taken out."""
    try:
        parsed = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        return parsed in _GLOBAL_UNICAST and not any(parsed in network for network in _TUNNELS)
    special = parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified
    return parsed.is_global and not special and not any(parsed in network for network in _RELAYS)


def check_addresses(host: str, addresses: Collection[str]) -> str:
    """The address to connect to, once all that a name resolves to are public.

    Raises:
        Refused: the name resolves to nothing, or to an address of this machine or network.
    """
    if not addresses:
        raise Refused(f"{host} has no address")
    for address in addresses:
        if not is_public(address):
            raise Refused(f"{host} resolves to {address}, which is not an address of the public internet")
    return next(iter(addresses))
