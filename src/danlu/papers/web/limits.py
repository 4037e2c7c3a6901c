"""Who asks, and how much they may: token buckets for each reader and each network, in memory."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from danlu.papers.settings import LimitSettings

#: A network may do so many times as much as one reader.
NETWORK = 4
#: Buckets that are kept; the ones used longest ago go first, and are full again by then.
BUCKETS = 100_000
_MINUTE, _HOUR = 60.0, 3600.0


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text.strip())
    except ValueError:
        return None
    # A socket that takes both kinds writes those of the old kind as new ones.
    return getattr(address, "ipv4_mapped", None) or address


def _within(address: str, prefix4: int, prefix6: int) -> str:
    parsed = _parsed(address)
    if parsed is None:
        return address
    return str(ip_network((parsed.packed, prefix4 if parsed.version == 4 else prefix6), strict=False))


def reader(address: str) -> str:
    """What counts as one reader: an address, or the /64 that one house has in the new scheme."""
    return _within(address, 32, 64)


def network(address: str) -> str:
    """The network of an address: its /24, or /48 in the new scheme; other text stands for itself."""
    return _within(address, 24, 48)


class Proxies:
    """Proxies whose word on the reader's address is taken.

    Args:
        trusted: addresses, or networks such as ``10.0.0.0/8``.

    Raises:
        ValueError: text that is neither.
    """

    def __init__(self, trusted: Sequence[str]) -> None:
        try:
            self._networks = [ip_network(text) for text in trusted]
        except ValueError as error:
            raise ValueError(f"trusted_proxies must be addresses or networks such as 10.0.0.0/8: {error}") from None

    def _trusts(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in held for held in self._networks)

    def reader(self, peer: str, forwarded: Sequence[str]) -> str:
        """The nearest address that is not a trusted proxy's: readers can write what they like before it.

        Args:
            peer: that is connected.
            forwarded: every X-Forwarded-For header in order.
        """
        named = [part for value in forwarded for part in value.split(",")]
        address = _parsed(peer)
        while address is not None and named and self._trusts(address):
            following = _parsed(named.pop())
            if following is None:
                break
            address = following
        return peer if address is None else str(address)


class Limiter:
    """Token buckets: each fills at a steady rate up to what may be asked in its period.

    Args:
        limits: of one reader.
        ticks: gives seconds that never go back.
        buckets: that are kept.
    """

    def __init__(self, limits: LimitSettings, ticks: Callable[[], float], buckets: int = BUCKETS) -> None:
        self._rates = {
            "ask": (limits.asks_per_hour, _HOUR),
            "search": (limits.searches_per_minute, _MINUTE),
            "fetch": (limits.fetches_per_hour, _HOUR),
            "count": (limits.counts_per_minute, _MINUTE),
        }
        self._ticks, self._most = ticks, buckets
        self._held: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        self._guard = threading.Lock()

    def take(self, kind: str, address: str, subnet: str) -> int:
        """Take one from the buckets of a reader and its network, or from neither.

        Args:
            kind: of what is asked for.
            address: of the reader.
            subnet: its network.

        Returns:
            0, or the seconds to wait until there is one in both.
        """
        size, period = self._rates[kind]
        now = self._ticks()
        # Both keys carry their kind: an address that cannot be read is its own network.
        buckets = (((kind, f"reader {reader(address)}"), size), ((kind, f"network {subnet}"), size * NETWORK))
        with self._guard:
            levels = [self._level(key, now, full, period) for key, full in buckets]
            waits = [(1 - level) * period / full for level, (_, full) in zip(levels, buckets, strict=True)]
            allowed = max(waits) <= 1e-9
            for level, (key, _) in zip(levels, buckets, strict=True):
                self._held[key] = (level - allowed, now)
                self._held.move_to_end(key)
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return 0 if allowed else max(1, math.ceil(max(waits)))

    def _level(self, key: tuple[str, str], now: float, full: int, period: float) -> float:
        level, then = self._held.get(key, (float(full), now))
        return min(float(full), level + (now - then) * full / period)
