"""What protects readers and the site."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient
from tests.papers.web.scene import Scripted, make_site

from danlu.papers import counters
from danlu.papers.ids import SOURCES
from danlu.papers.settings import LimitSettings
from danlu.papers.store import Store
from danlu.papers.web.app import create_app
from danlu.papers.web.limits import Limiter, Proxies, network, reader
from danlu.papers.web.security import FIELD, LASTING, MOST_FORM, Guard, policy

COUNT = "/count/2405.00001"


class Clock:
    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


def opened(folder, peer="203.0.113.5", engine=None, **settings):
    site = make_site(folder, engine or Scripted(), **settings)
    return TestClient(create_app(site), follow_redirects=False, client=(peer, 50000))


def rules(text):
    return {part.split()[0]: part.split()[1:] for part in text.split("; ")}


def test_every_response_carries_the_headers(client):
    statuses = set()
    for path in (
        "/", "/arxiv/cs.AI", "/arxiv/nothing", "/none", "/health", "/feed/arxiv/cs.AI", "/api/v1/none", "/export?ids=x",
        "/robots.txt", "/arxiv/cs.LG,cs.AI", "/answers/2405.00001",
    ):  # fmt: skip
        answer = client.get(path)
        statuses.add(answer.status_code)
        assert answer.headers["Content-Security-Policy"] == policy()
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert "camera=()" in answer.headers["Permissions-Policy"]
    assert statuses == {200, 204, 301, 400, 404}


def test_the_policy_lets_no_script_in_that_is_not_the_sites_own_file():
    found = rules(policy())
    assert found["default-src"] == ["'none'"] and found["script-src"] == ["'self'"]
    assert found["frame-ancestors"] == ["'none'"] and found["base-uri"] == ["'none'"]
    assert found["form-action"] == ["'self'"] and found["font-src"] == ["'self'"]
    assert found["worker-src"] == ["'self'", "blob:"] and found["img-src"] == ["'self'", "data:"]
    assert "unsafe" not in policy() and "*" not in policy()


def test_the_policy_connects_to_the_hosts_of_sources_and_to_no_other():
    hosts = {host for source in SOURCES.values() for host in source.hosts}
    assert {"arxiv.org", "openreview.net", "aclanthology.org"} <= hosts
    assert rules(policy())["connect-src"] == ["'self'", *sorted(f"https://{host}" for host in hosts)]
    others = [value for name, values in rules(policy()).items() if name != "connect-src" for value in values]
    assert not [value for value in others if "." in value]


@pytest.mark.parametrize(
    "path", ["/", "/arxiv/cs.AI", "/arxiv/2405.00003", "/arxiv/search?query=x", "/health", "/help"]
)
def test_no_page_has_a_script_or_a_style_that_the_policy_would_stop(client, path):
    text = client.get(path, headers={"Accept": "text/html"}).text
    assert not re.search(r"<script(?![^>]*\ssrc=)", text)
    assert not re.search(r"<[^>]+\s(?:style|on[a-z]+)\s*=", text) and "<style" not in text
    assert not re.search(r'(?:src|href)="(?:javascript|data):', text)


def test_a_token_opens_in_the_header_and_in_the_form(client, token):
    assert client.post(COUNT, data={"kind": "pdf"}, headers={"X-CSRF-Token": token}).status_code == 200
    assert client.post(COUNT, data={"kind": "pdf", FIELD: token}).status_code == 200


def test_without_a_token_that_holds_nothing_is_counted_or_asked(client, site, token):
    for given in ("", "x", "1.2", "é", "1795557600.", ".", "9" * 5000, token[:-1], f"1{token}", token.upper()):
        headers = {"X-CSRF-Token": given.encode()} if given else {}
        for path in (COUNT, "/answers/2405.00001"):
            assert client.post(path, data={"kind": "pdf"}, headers=headers).status_code == 403
            assert client.post(path, data={"kind": "pdf", FIELD: given}).status_code == 403
    assert site.queue.depth() == {} and counters.counts(site.store, [1]) == {}


def test_a_token_is_the_same_for_an_hour_and_runs_out_after_a_week(site):
    clock = Clock(1_700_000_000.0)
    guard = Guard(site, clock)
    given = guard.sign(int(clock.now))
    assert guard.holds(given)
    clock.now += LASTING
    assert guard.holds(given)
    clock.now += 1
    assert not guard.holds(given)
    clock.now = 1_700_000_000.0 - 61
    assert not guard.holds(given)


def test_two_pages_of_one_hour_have_the_same_token(client):
    client.app.state.guard.clock = clock = Clock(1_700_002_800.0)
    first = client.get("/help").text
    clock.now += 100
    assert client.get("/help").text == first
    clock.now += 3600
    assert client.get("/help").text != first


def test_a_token_of_another_site_does_not_hold(site):
    other = Store("sqlite://")
    mine, theirs = Guard(site), Guard(type(site)(**{**vars(site), "store": other}))
    assert mine.holds(mine.sign(int(mine.clock()))) and not mine.holds(theirs.sign(int(mine.clock())))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"}, 403),
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "https://papers.example.org"}, 200),
        ({"Origin": "https://evil.example.org"}, 403),
        ({"Origin": "http://testserver.evil.example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({}, 200),
    ],
)
def test_a_page_of_another_site_cannot_send_a_form_although_it_knows_a_token(tmp_path, headers, status):
    client = opened(tmp_path, public_url="https://papers.example.org/")
    good = client.app.state.guard.sign(int(client.app.state.guard.clock()))
    answer = client.post(COUNT, data={"kind": "pdf"}, headers={"X-CSRF-Token": good, **headers})
    assert answer.status_code == status


def test_a_form_that_is_too_long_is_not_read_to_its_end(client):
    assert client.post(COUNT, data={"kind": "x" * MOST_FORM}).status_code == 413


def test_a_form_of_another_kind_is_no_form(client, token):
    body = f"kind=pdf&{FIELD}={token}"
    assert client.post(COUNT, content=body, headers={"Content-Type": "text/plain"}).status_code == 403


def test_a_reader_has_so_many_and_then_waits(tmp_path):
    ticks = Clock()
    limiter = Limiter(LimitSettings(searches_per_minute=6), ticks)
    take = lambda: limiter.take("search", "203.0.113.5", "203.0.113.0/24")  # noqa: E731
    assert [take() for _ in range(7)] == [0] * 6 + [10]
    ticks.now += 4
    assert take() == 6
    ticks.now += 6
    assert [take(), take()] == [0, 10]
    ticks.now += 3600
    assert [take() for _ in range(7)] == [0] * 6 + [10]


def test_kinds_have_limits_of_their_own():
    limits = LimitSettings(asks_per_hour=2, searches_per_minute=2, fetches_per_hour=1, counts_per_minute=1)
    limiter = Limiter(limits, Clock())
    took = {kind: [limiter.take(kind, "a", "a") for _ in range(3)] for kind in ("ask", "search", "fetch", "count")}
    assert took == {"ask": [0, 0, 1800], "search": [0, 0, 30], "fetch": [0, 3600, 3600], "count": [0, 60, 60]}


def test_a_network_may_do_four_times_as_much_as_one_of_its_readers():
    limiter = Limiter(LimitSettings(searches_per_minute=3), Clock())
    addresses = [f"203.0.113.{place}" for place in range(20)]
    allowed = [limiter.take("search", each, network(each)) == 0 for each in addresses for _ in range(3)]
    assert allowed == [True] * 12 + [False] * 48
    assert limiter.take("search", "203.0.114.1", network("203.0.114.1")) == 0


def test_what_is_refused_costs_nothing():
    ticks = Clock()
    limiter = Limiter(LimitSettings(asks_per_hour=1), ticks)
    assert limiter.take("ask", "203.0.113.1", "net") == 0
    # This reader's refusals leave the three that its network has.
    assert [limiter.take("ask", "203.0.113.1", "net") for _ in range(20)] == [3600] * 20
    assert [limiter.take("ask", f"203.0.113.{place}", "net") == 0 for place in range(2, 7)] == [True] * 3 + [False] * 2
    ticks.now += 3600
    # The refusal of the network has taken nothing from its readers.
    assert limiter.take("ask", "203.0.113.6", "net") == 0


def test_readers_and_networks_of_both_kinds_of_address():
    assert reader("2001:db8:1:2:aaaa::1") == reader("2001:db8:1:2:bbbb::2") != reader("2001:db8:1:3::1")
    assert network("2001:db8:1:2::1") == network("2001:db8:1:ffff::1") != network("2001:db8:2::1")
    assert reader("203.0.113.5") != reader("203.0.113.6") and network("203.0.113.5") == network("203.0.113.250")
    assert network("203.0.113.5") != network("203.0.112.5")
    assert reader("::ffff:203.0.113.5") == reader("203.0.113.5") and reader("testclient") == "testclient"


def test_the_buckets_of_a_flood_are_bounded_and_the_oldest_go():
    limiter = Limiter(LimitSettings(asks_per_hour=1), Clock(), buckets=100)
    for place in range(1000):
        limiter.take("ask", f"client{place}", f"net{place}")
    assert len(limiter._held) == 100
    assert limiter.take("ask", "client999", "net999") > 0 and limiter.take("ask", "client0", "net0") == 0


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "found"),
    [
        ((), "198.51.100.1", ["203.0.113.9"], "198.51.100.1"),
        (("10.0.0.1",), "198.51.100.1", ["203.0.113.9"], "198.51.100.1"),
        (("10.0.0.1",), "10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        (("10.0.0.1",), "::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        (("10.0.0.1",), "10.0.0.1", ["1.2.3.4, 203.0.113.9"], "203.0.113.9"),
        (("10.0.0.0/8",), "10.0.0.1", ["1.2.3.4, 203.0.113.9, 10.9.9.9"], "203.0.113.9"),
        (("10.0.0.0/8",), "10.0.0.1", ["1.2.3.4", "203.0.113.9"], "203.0.113.9"),
        (("10.0.0.1",), "10.0.0.1", ["203.0.113.9, <script>"], "10.0.0.1"),
        (("10.0.0.1",), "10.0.0.1", [], "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.1", ["10.0.0.2"], "10.0.0.2"),
        (("10.0.0.1",), "", ["203.0.113.9"], ""),
    ],
)
def test_only_a_trusted_proxy_is_believed_and_only_about_whom_it_saw(trusted, peer, forwarded, found):
    assert Proxies(trusted).reader(peer, forwarded) == found


def test_a_proxy_that_is_no_address_is_named_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"trusted_proxies .*nginx"):
        opened(tmp_path, trusted_proxies=("nginx",))


def test_a_reader_cannot_escape_its_limit_by_a_header(tmp_path):
    client = opened(tmp_path, limits={"searches_per_minute": 2})
    answers = [client.get("/feed/search?query=x", headers={"X-Forwarded-For": f"203.0.113.{n}"}) for n in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]


def test_behind_a_trusted_proxy_every_reader_has_its_own_limit(tmp_path):
    client = opened(tmp_path, "10.0.0.1", limits={"searches_per_minute": 1}, trusted_proxies=("10.0.0.1",))
    found = [
        client.get("/feed/search?query=x", headers={"X-Forwarded-For": address}).status_code
        for address in ("203.0.113.1", "203.0.113.2", "203.0.113.1")
    ]
    assert found == [200, 200, 429]


@pytest.mark.parametrize(
    "path",
    ["/arxiv/search?query=other", "/feed/search?query=x", "/api/v1/search?query=x", "/api/v1/related/2405.00001"],
)
def test_every_kind_of_search_counts_against_one_limit_and_says_when_to_come_back(tmp_path, path):
    client = opened(tmp_path, limits={"searches_per_minute": 1})
    assert client.get("/rel/2405.00001").status_code == 200
    answer = client.get(path)
    assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 60


def test_asking_has_a_limit_and_the_operator_has_none(tmp_path):
    client = opened(tmp_path, limits={"asks_per_hour": 1}, admin_token="let me in")
    good = {"X-CSRF-Token": client.app.state.guard.sign(int(client.app.state.guard.clock()))}

    def ask(number, **more):
        return client.post(f"/answers/2405.0000{number}", headers={**good, **more}).status_code

    assert [ask(1), ask(2)] == [303, 429]
    for wrong in ("", "let me", "let me in ", "é"):
        assert ask(2, **{"X-Admin-Token": wrong.encode()}) == 429
    assert ask(2, **{"X-Admin-Token": "let me in"}) == 303


def test_a_site_without_operator_token_has_no_operator(tmp_path):
    client = opened(tmp_path, limits={"searches_per_minute": 1})
    for _ in range(2):
        answer = client.get("/feed/search?query=x", headers={"X-Admin-Token": ""})
    assert answer.status_code == 429


def test_a_host_that_is_none_is_refused_and_breaks_nothing(client):
    for host in ("a b", "[::1", "x/../y", "evil.example@testserver", "a\\b", "", "x:y"):
        for path in ("/", "/feed/arxiv/cs.AI", "/none", "/opensearch.xml"):
            answer = client.get(path, headers={"Host": host})
            assert answer.status_code == 400 and answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_host_with_a_name_or_an_address_is_served(client):
    for host in ("papers.example.org", "localhost:8000", "[::1]:8000", "192.0.2.1", "my_host"):
        assert client.get("/robots.txt", headers={"Host": host}).status_code == 200


def test_nothing_that_a_crawler_can_read_starts_work(client, site):
    for route in (
        "/answers/2405.00001", "/answers/2405.00001?lang=en&v=1", "/api/v1/card/2405.00001", "/arxiv/2405.00001",
        "/rel/2405.00001", "/arxiv/cs.AI", "/count/2405.00001", "/export?ids=2405.00001", "/feed/arxiv/cs.AI",
    ):  # fmt: skip
        client.get(route)
        client.head(route)
    assert site.queue.depth() == {}


def test_robots_are_kept_from_what_costs_work_and_not_from_papers(client):
    from urllib.robotparser import RobotFileParser

    robots = RobotFileParser()
    robots.parse(client.get("/robots.txt").text.splitlines())
    closed = (
        "/arxiv/search?query=x", "/venue/search?query=x", "/rel/2405.00001", "/answers/2405.00001", "/export?ids=1",
        "/api/v1/venues", "/feed/arxiv/cs.AI", "/count/2405.00001",
    )  # fmt: skip
    assert not [path for path in closed if robots.can_fetch("Bot", path)]
    assert all(robots.can_fetch("Bot", path) for path in ("/", "/arxiv/cs.AI", "/arxiv/2405.00001", "/venue/ICLR.2024"))


def test_the_search_description_leads_to_pages_and_feeds_that_exist(tmp_path):
    from xml.etree import ElementTree

    client = opened(tmp_path, public_url="https://papers.example.org/")
    answer = client.get("/opensearch.xml")
    assert answer.headers["Content-Type"].startswith("application/opensearchdescription+xml")
    space = {"o": "http://a9.com/-/spec/opensearch/1.1/"}
    urls = {url.get("type"): url for url in ElementTree.fromstring(answer.text).findall("o:Url", space)}
    for kind in ("text/html", "application/atom+xml"):
        address = urls[kind].get("template").replace("{searchTerms}", "graphs")
        assert address.startswith("https://papers.example.org/")
        found = client.get(address.removeprefix("https://papers.example.org"))
        assert found.status_code == 200 and found.headers["Content-Type"].startswith(kind) and "graphs" in found.text
