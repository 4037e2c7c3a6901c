from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.papers.net.errors import Refused
from danlu.papers.net.guard import check_addresses, check_url, is_public
from danlu.papers.net.policy import ENDPOINTS, SOURCES, Policy, parse_retry_after

NOW = datetime(2024, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0), ("120", 120), (" 7 ", 7), ("86400", 600), ("9" * 18, 600),
        ("Mon, 01 Jan 2024 12:01:00 GMT", 60), ("Monday, 01-Jan-24 12:01:00 GMT", 60), ("Mon Jan  1 12:01:00 2024", 60),
        ("Mon, 01 Jan 2024 12:01:00", 60), ("Mon, 01 Jan 2024 11:00:00 GMT", 0), ("Fri, 31 Dec 9999 23:59:59 GMT", 600),
        (None, None), ("", None), ("1.5", None), ("-1", None), ("+1", None), ("٣", None), ("1e3", None), ("soon", None),
        ("Mon, 99 Foo 2024", None),
    ],
)  # fmt: skip
def test_delays_of_servers_are_read_and_capped(value, seconds):
    assert parse_retry_after(value, NOW, 600) == seconds


@given(st.text(max_size=40))
def test_any_header_is_a_delay_within_the_cap_or_nothing(value):
    found = parse_retry_after(value, NOW, 600)
    assert found is None or 0 <= found <= 600


def test_waits_follow_the_formula():
    assert [SOURCES.wait(a, lambda: 0.0) for a in range(1, 7)] == [3, 6, 12, 24, 48, 60]
    assert SOURCES.wait(2, lambda: 1.0) == 9 and SOURCES.wait(10_000, lambda: 1.0) == 60
    assert [ENDPOINTS.wait(a, lambda: 0.0) for a in (1, 2, 3)] == [1, 2, 4]


@pytest.mark.parametrize(
    "given_values",
    [
        {"attempts": 0},
        {"deadline": 0},
        {"wait_initial": -1},
        {"wait_initial": 61},
        {"wait_base": 0.5},
        {"jitter": -1},
        {"deadline": float("inf")},
        {"retry_after_cap": float("nan")},
    ],
)
def test_a_policy_out_of_range_names_the_field(given_values):
    with pytest.raises(ValueError, match=next(iter(given_values))):
        Policy(**given_values)


@pytest.mark.parametrize(
    "url",
    [
        "http://arxiv.org/abs/1", "https://arxiv.org:8443/", "https://me@arxiv.org/", "https://arxiv.org@evil.example/",
        "https://evil.example/",
        "https://arxiv.org.evil.example/", "https://xarxiv.org/", "file:///etc/passwd", "//arxiv.org/", "https://arxiv.org\\@evil.example/",
        "https://arxiv.org/\n", "https://127.0.0.1/", "https://[::1]/", "https://аrxiv.org/", "https://arxiv.org:x/",
        "", "https://",
    ],
)  # fmt: skip
def test_only_the_hosts_of_a_source_may_be_asked(url):
    with pytest.raises(Refused):
        check_url(url, {"arxiv.org"})


def test_hosts_are_compared_without_case():
    assert check_url("https://ArXiv.org:443/abs/1", {"arxiv.org"}).path == "/abs/1"


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 239.1.1.1 240.0.0.1 "
    "255.255.255.255 192.0.2.1 198.18.0.1 192.88.99.1 ::1 :: fe80::1 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 "
    "::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1::1 "
    "2001::1 2001:db8::1 fec0::1 100::1 nonsense fe80::1%eth0".split(),
)
def test_addresses_that_are_not_public_are_refused(address):
    assert not is_public(address)
    with pytest.raises(Refused):
        check_addresses("arxiv.org", ["151.101.3.42", address])


@pytest.mark.parametrize("address", ["151.101.3.42", "8.8.8.8", "2a04:4e42::81", "::ffff:8.8.8.8", "2606:4700::1111"])
def test_public_addresses_are_not(address):
    assert is_public(address) and check_addresses("arxiv.org", [address]) == address


def test_a_name_without_address_is_refused():
    with pytest.raises(Refused, match="no address"):
        check_addresses("arxiv.org", [])
