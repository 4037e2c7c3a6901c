"""Feeds have the papers of their pages, in order, and change only where something has changed."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from xml.etree import ElementTree

import pytest
from tests.papers.web.scene import BEFORE, DAY, make_site, record, shown

from danlu.papers import ids, lists, schema
from danlu.papers.ids import parse_id
from danlu.papers.records import VenuePlace
from danlu.papers.web import feeds
from danlu.papers.web.models import clean

ATOM = {"a": feeds.ATOM, "fh": feeds.HISTORY}
MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z")


def read(client, path):
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/atom+xml; charset=utf-8"
    return ElementTree.fromstring(answer.content)


def texts(root, path):
    return [each.text for each in root.findall(path, ATOM)]


def entry_ids(root):
    return texts(root, "a:entry/a:id")


def link(root, relation):
    return next((each.get("href") for each in root.findall("a:link", ATOM) if each.get("rel") == relation), None)


def source_ids(page):
    return [ids.abs_url(parse_id(each)) for each in shown(page)]


@pytest.mark.parametrize(
    ("feed", "page"),
    [
        ("/feed/arxiv/cs.AI+cs.LG-cs.CY", "/arxiv/cs.AI+cs.LG-cs.CY?show=500"),
        ("/feed/arxiv/cs.AI", "/arxiv/cs.AI?show=500"),
        (f"/feed/arxiv/cs.AI?date={BEFORE}", f"/arxiv/cs.AI?date={BEFORE}"),
        ("/feed/venue/ICLR.2024", "/venue/ICLR.2024"),
        ("/feed/venue/ICLR", "/venue/ICLR"),
        ("/feed/venue/iclr.2023", "/venue/ICLR.2023"),
        ("/feed/venue/ICLR.2024?group=Poster", "/venue/ICLR.2024?group=Poster"),
        ("/feed/search?query=graphs", "/arxiv/search?query=graphs&sort=date&show=500"),
        ("/feed/search?query=paper&branch=venue", "/venue/search?query=paper&sort=date"),
    ],
)
def test_the_entries_are_the_papers_of_the_page_in_its_order(client, feed, page):
    found = entry_ids(read(client, feed))
    assert found == source_ids(client.get(page).text) and found


def test_a_feed_is_atom(client):
    for path in ("/feed/arxiv/cs.AI", "/feed/venue/ICLR", "/feed/venue/latest", "/feed/search?query=graphs"):
        root = read(client, path)
        assert root.tag == f"{{{feeds.ATOM}}}feed"
        for element in (root, *root.findall("a:entry", ATOM)):
            for name in ("id", "title", "updated"):
                assert len(element.findall(f"a:{name}", ATOM)) == 1 and element.find(f"a:{name}", ATOM).text
            assert MOMENT.match(element.find("a:updated", ATOM).text)
            assert link(element, "alternate").startswith("http://testserver/")
        assert len(set(entry_ids(root))) == len(entry_ids(root)) > 0
        # Every entry has an author, or else the feed has one.
        assert texts(root, "a:author/a:name") == ["danlu papers"]
        assert link(root, "self") == f"http://testserver{path}" == root.find("a:id", ATOM).text


def test_what_papers_say_is_text_and_nothing_else(client):
    root = read(client, "/feed/arxiv/cs.AI")
    titles = texts(root, "a:entry/a:title")
    assert titles[0] == "Rotary <b>positions</b> & $x_1 < y$" and "<script>alert(1)</script>" in titles
    entry = root.findall("a:entry", ATOM)[1]
    assert len(entry.findall("a:author", ATOM)) == 60
    assert {each.tag.partition("}")[2] for each in entry.iter()} == {
        "entry", "id", "title", "link", "author", "name", "category", "published", "updated", "summary",
    }  # fmt: skip
    assert "&lt;script>" in client.get("/feed/arxiv/cs.AI").text.replace("&gt;", ">")


def test_characters_that_xml_does_not_have_are_left_out():
    assert clean("a\x00b\x0bc\ud800d\ufffee\tf\ng\U0001f600") == "abcde\tf\ng\U0001f600"
    for number in [*range(32), *range(0xD7F0, 0xE010), 0xFFFD, 0xFFFE, 0xFFFF, 0x10FFFF]:
        root = ElementTree.Element("a")
        root.text = clean(f"x{chr(number)}y")
        assert ElementTree.fromstring(ElementTree.tostring(root, encoding="utf-8")).text[0] == "x"


def test_hostile_authors_and_titles_leave_a_feed_readable(client, site):
    with site.store.writing() as connection:
        connection.execute(
            schema.paper.update()
            .where(schema.paper.c.ext_id == "2405.00001")
            .values(title="\x01\x1f]]> &amp; \ufffe", authors=["\ud800", "\x02"], categories="cs.AI \x03x")
        )
    root = read(client, "/feed/arxiv/cs.AI")
    assert texts(root, "a:entry/a:title")[0] == "]]> &amp; "


def test_nothing_depends_on_the_time_of_the_request(client):
    for path in ("/feed/arxiv/cs.AI", "/feed/venue/ICLR", "/feed/venue/latest", "/feed/search?query=graphs"):
        first = client.get(path)
        assert first.content == client.get(path).content
        updated = datetime.fromisoformat(texts(ElementTree.fromstring(first.content), "a:updated")[0])
        assert updated <= datetime.now(UTC)
    assert texts(read(client, "/feed/arxiv/cs.AI"), "a:updated") == [f"{DAY}T00:00:00Z"]
    assert texts(read(client, "/feed/search?query=graphs"), "a:updated") == ["2024-05-15T10:30:00Z"]


def test_a_subject_without_papers_has_an_empty_feed_that_does_not_change(client):
    root = read(client, "/feed/arxiv/q-bio.GN")
    assert not entry_ids(root) and texts(root, "a:updated") == ["1970-01-01T00:00:00Z"]


def test_a_reader_that_has_the_feed_gets_it_again_only_after_a_change(client, site):
    first = client.get("/feed/arxiv/cs.AI")
    again = client.get("/feed/arxiv/cs.AI", headers={"If-None-Match": f'"x", {first.headers["ETag"]}'})
    assert again.status_code == 304 and not again.content and again.headers["ETag"] == first.headers["ETag"]
    site.store.upsert([record("2405.00009", "One more")])
    after = client.get("/feed/arxiv/cs.AI", headers={"If-None-Match": first.headers["ETag"]})
    assert after.status_code == 200 and "One more" in after.text


@pytest.mark.parametrize("written", ["cs.LG,cs.AI", "cs.LG+cs.AI+cs.LG", "cs.AI,cs.LG"])
def test_expressions_that_mean_the_same_have_one_feed(client, written):
    answer = client.get(f"/feed/arxiv/{written}?date={DAY}")
    assert answer.status_code == 301 and answer.headers["Location"] == f"/feed/arxiv/cs.AI+cs.LG?date={DAY}"


def test_a_reader_that_was_away_finds_every_day(client, site):
    store = site.store
    store.upsert(
        [record("2405.00700", "Older", day=date(2024, 5, 10)), record("2405.00701", "Oldest", day=date(1, 1, 1))]
    )
    root, found = read(client, "/feed/arxiv/cs.AI"), []
    assert root.find("fh:archive", ATOM) is None and link(root, "current") is None
    while True:
        found.append(texts(root, "a:title")[0].partition(", ")[2])
        earlier = link(root, "prev-archive")
        if earlier is None:
            break
        root = read(client, earlier.removeprefix("http://testserver"))
        assert root.find("fh:archive", ATOM) is not None
        assert link(root, "current") == "http://testserver/feed/arxiv/cs.AI"
    expression = feeds.read_expression("cs.AI")
    assert found == [day.isoformat() for day, _ in lists.days(store, expression)] and len(found) == 4


def test_what_does_not_fit_into_one_document_follows_in_the_next(client, monkeypatch):
    whole = entry_ids(read(client, "/feed/arxiv/cs.AI"))
    monkeypatch.setattr(feeds._papers, "__defaults__", (*feeds._papers.__defaults__[:-1], 20))
    path, found = "/feed/arxiv/cs.AI", []
    while path:
        root = read(client, path)
        found += entry_ids(root)
        assert len(entry_ids(root)) <= 20
        path = (link(root, "next") or "").removeprefix("http://testserver")
    assert found == whole and len(whole) > 60


def test_a_search_with_many_results_gives_the_newest_first_and_the_rest_after_them(tmp_path):
    from starlette.testclient import TestClient

    from danlu.papers.web.app import create_app

    site = make_site(tmp_path, None)
    # The older ones fit better.
    titles = {n: "Wide " * (28 - n % 28) for n in range(1, 151)}
    site.store.upsert(record(f"2406.0{n:04}", titles[n], day=date(2024, 6, 1 + n % 28)) for n in titles)
    site.index.update(site.store)
    client = TestClient(create_app(site))
    root = read(client, "/feed/search?query=wide+%26+%22%3C")
    assert len(entry_ids(root)) == feeds.SEARCHED
    days = [int(each[-4:]) % 28 for each in entry_ids(root)]
    assert days == sorted(days, reverse=True)
    rest = entry_ids(read(client, link(root, "next").removeprefix("http://testserver")))
    assert len(set(entry_ids(root) + rest)) == 150


def test_the_venues_that_were_added_last_come_first(client, site):
    with site.store.writing() as connection:
        for year, added in ((2023, datetime(2024, 3, 1)), (2024, datetime(2024, 2, 1))):
            connection.execute(schema.venue.update().where(schema.venue.c.year == year).values(added_at=added))
    root = read(client, "/feed/venue/latest")
    assert texts(root, "a:entry/a:title") == ["ICLR 2023: 1 papers", "ICLR 2024: 3 papers"]
    assert texts(root, "a:updated") == ["2024-03-01T00:00:00Z"]
    site.store.upsert([record("new1@OpenReview", "N", (), listings=(), venues=(VenuePlace("A & B", 2025, "", 0),))])
    root = read(client, "/feed/venue/latest")
    assert texts(root, "a:entry/a:title")[0] == "A & B 2025: 1 papers"
    page = entry_ids(root)[0].removeprefix("http://testserver")
    assert client.get(page).status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "names"),
    [
        ("/feed/arxiv/cs.XX", 400, "cs.XX"),
        ("/feed/arxiv/cs.AI?date=2024-13-01", 400, "2024-13-01"),
        ("/feed/arxiv/cs.AI?date=20240517", 400, "20240517"),
        ("/feed/arxiv/cs.AI?after=x", 400, "after"),
        ("/feed/venue/NONE", 404, "NONE"),
        ("/feed/venue/ICLR.1999", 404, "ICLR.1999"),
        ("/feed/venue/%00", 404, "no venue"),
        ("/feed/venue/ICLR.2024?group=Best", 400, "Best"),
        ("/feed/search?branch=all", 400, "all"),
        ("/feed/nothing", 404, "/feed/nothing"),
    ],
)
def test_what_cannot_be_read_is_named(client, path, status, names):
    answer = client.get(path)
    assert answer.status_code == status and names in answer.text


def test_any_query_has_a_feed(client):
    for query in ("", '"', "NEAR(", "a:b", "*", "%00", "-x", "C%2B%2B", "%ED%A0%80", "x" * 5000):
        read(client, f"/feed/search?query={query}")


def test_the_operator_says_under_which_address_readers_reach_the_site(tmp_path):
    from starlette.testclient import TestClient

    from danlu.papers.web.app import create_app

    client = TestClient(create_app(make_site(tmp_path, None, public_url="https://papers.example.org/p/")))
    root = read(client, "/feed/arxiv/cs.AI")
    assert root.find("a:id", ATOM).text == "https://papers.example.org/p/feed/arxiv/cs.AI"
    assert link(root.find("a:entry", ATOM), "alternate") == "https://papers.example.org/p/arxiv/2405.00001"
    assert "testserver" not in client.get("/feed/arxiv/cs.AI").text
