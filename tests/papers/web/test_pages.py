"""Pages as a browser without scripts gets them."""

from __future__ import annotations

import asyncio
import gzip
import html
import re
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from tests.papers.web.scene import BEFORE, DAY, Scripted, make_site, record, shown

from danlu.papers import counters, synthetic
from danlu.papers.pipeline import Answering
from danlu.papers.records import Listing
from danlu.papers.web import assets
from danlu.papers.web.app import create_app
from danlu.papers.worker import Worker

FRAGMENT = {"HX-Request": "true"}


def chunks(client, path):
    """The papers of a list, chunk after chunk, each from the address that the one before gives."""
    found, address = [], path
    while address:
        text = client.get(address, headers=FRAGMENT).text
        found.append(shown(text))
        match = re.search(r'rel="next" href="([^"]+)"', text)
        address = html.unescape(match.group(1)) if match else None
    return found


@pytest.mark.parametrize("written", ["cs.LG,cs.AI", "cs.AI,cs.LG", "cs.LG+cs.AI", "cs.AI+cs.AI+cs.LG"])
def test_expressions_that_mean_the_same_have_one_page(client, written):
    answer = client.get(f"/arxiv/{written}?date={DAY}&show=100")
    if written != "cs.AI+cs.LG":
        assert answer.status_code == 301
        assert answer.headers["location"] == f"/arxiv/cs.AI+cs.LG?date={DAY}&show=100"
        answer = client.get(answer.headers["location"])
    assert answer.status_code == 200
    assert len(shown(answer.text)) == 65


def test_a_difference_leaves_out_papers_that_are_in_the_other_subject_as_well(client):
    both = set(shown(client.get("/arxiv/cs.AI?show=100").text))
    rest = set(shown(client.get("/arxiv/cs.AI-cs.CY?show=100").text))
    assert both - rest == {"2405.00003"}


def test_a_list_keeps_the_source_order_and_what_came_late_stands_last_and_says_so(client):
    text = client.get("/arxiv/cs.AI?show=100").text
    found = shown(text)
    assert found[:3] == ["2405.00001", "2405.00003", "2405.00004"]
    assert found[-1] == "2405.00500"
    assert text.count("added later") == 2  # in the sum and at the paper
    assert "cross-list" in text


def test_chunks_together_are_the_list_although_papers_arrive_between_them(client, site):
    whole = shown(client.get("/arxiv/cs.AI?show=200").text)
    first = client.get("/arxiv/cs.AI").text
    following = html.unescape(re.search(r'rel="next" href="([^"]+)"', first).group(1))
    assert "snapshot=" in following
    site.store.upsert([record("2405.00050", "New", listings=(Listing(DAY, "cs.AI", "new", 2),))])
    found = [*shown(first), *sum(chunks(client, following), [])]
    assert found == whole
    assert "2405.00050" in shown(client.get("/arxiv/cs.AI").text)


def test_chunks_by_stars_follow_the_order_of_the_first_although_stars_change(client, site):
    def star(identifier, who):
        paper = site.store.reading
        with paper() as connection:
            key = connection.exec_driver_sql(f"SELECT pk FROM paper WHERE ext_id = '{identifier}'").scalar()
        counters.count(site.store, key, "pdf", DAY, counters.reader_digest(site.store, who, DAY))

    star("2405.00150", "a")
    star("2405.00150", "b")
    star("2405.00140", "a")
    assert shown(client.get("/arxiv/cs.AI?sort=stars").text)[:3] == ["2405.00150", "2405.00140", "2405.00001"]
    first = client.get("/arxiv/cs.AI?sort=stars&show=1").text
    following = html.unescape(re.search(r'rel="next" href="([^"]+)"', first).group(1))
    for who in "abc":
        star("2405.00158", who)
        star("2405.00001", who)
    found = [*shown(first), *sum(chunks(client, following), [])]
    assert sorted(found) == sorted(shown(client.get("/arxiv/cs.AI?show=200").text))
    assert len(set(found)) == len(found) and found[:2] == ["2405.00150", "2405.00140"]


def test_preference_words_move_matches_to_the_front_and_the_rest_keeps_its_order(client):
    plain = shown(client.get("/arxiv/cs.AI?show=200").text)
    found = shown(client.get("/arxiv/cs.AI?show=200&sort=preference&words=versions+late").text)
    assert set(found[:2]) == {"2405.00004", "2405.00500"}
    assert found[2:] == [name for name in plain if name not in found[:2]]
    assert shown(client.get("/arxiv/cs.AI?show=200&sort=preference").text) == plain
    part = client.get("/arxiv/cs.AI?sort=preference&words=versions+late").text
    assert re.search(r"head=[0-9]+\.[0-9]+&|head=[0-9]+\.[0-9]+\"", html.unescape(part))  # what moved, and no more


def test_time_puts_the_latest_submission_first(client):
    assert shown(client.get("/arxiv/cs.AI+cs.LG?sort=time").text)[0] == "2405.00002"


def test_days_lead_to_one_another_and_an_empty_one_says_where_to_go(client):
    text = client.get("/arxiv/cs.AI").text
    assert f'rel="prev" href="/arxiv/cs.AI?date={BEFORE}"' in text
    assert f'rel="next" href="/arxiv/cs.AI?date={DAY}"' in client.get(f"/arxiv/cs.AI?date={BEFORE}").text
    empty = client.get("/arxiv/cs.AI?date=2024-05-18")
    assert empty.status_code == 200 and f"/arxiv/cs.AI?date={DAY}" in empty.text and not shown(empty.text)


@pytest.mark.parametrize(
    ("address", "token"),
    [
        ("/arxiv/cs.AI+nosuch.XX", "nosuch.XX"),
        ("/arxiv/cs.AI++cs.LG", "+cs.LG"),
        ("/arxiv/cs.AI?date=yesterday", "yesterday"),
        ("/arxiv/cs.AI?date=2024-02-31", "2024-02-31"),
        ("/arxiv/cs.AI?sort=best", "best"),
        ("/arxiv/cs.AI?show=0", "0"),
        ("/arxiv/cs.AI?after=-1", "-1"),
        ("/arxiv/cs.AI?snapshot=1e3", "1e3"),
        ("/arxiv/cs.AI?after=1&sort=stars&head=1.x", "1.x"),
        ("/arxiv/2405.00001,24x5.1", "24x5.1"),
        ("/venue/ICLR.2024?group=Nobody", "Nobody"),
        ("/answers/2405.00001?lang=tlh", "tlh"),
        ("/answers/2405.00001?v=9", "9"),
        ("/answers/2405.00001/stream?job=x", "x"),
    ],
)
def test_what_cannot_be_read_is_a_400_that_names_it(client, address, token):
    answer = client.get(address)
    assert answer.status_code == 400
    assert f'<code class="token">{html.escape(token, quote=True)}</code>' in answer.text


@pytest.mark.parametrize(
    "address",
    """
    /arxiv/2405.09999 /venue/none@OpenReview /venue/NOPE.2024 /venue/ICLR.1999 /nothing /rel/2405.09999
    /answers/2405.09999 /answers/2405.00001/stream?job=99 /static/js/none.js
    """.split(),
)
def test_what_the_site_does_not_have_is_a_404(client, address):
    answer = client.get(address)
    assert answer.status_code == 404


def test_an_unknown_paper_is_linked_at_its_source(client):
    assert 'href="https://arxiv.org/abs/2405.09999"' in client.get("/arxiv/2405.09999").text


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("/arxiv/2405.1", None),
        ("/arxiv/arXiv:2405.00001", "/arxiv/2405.00001"),
        ("/arxiv/1406.02661", "/arxiv/1406.2661"),
        ("/arxiv/2405.00001,2405.00001", "/arxiv/2405.00001"),
        ("/arxiv/hep-th/9901001v1", None),
        ("/venue/2405.00001", None),
        ("/arxiv/note0@openreview", "/venue/note0@OpenReview"),
        ("/venue/2405.00001,note0@OpenReview", None),
        ("/venue/iclr.2024", "/venue/ICLR.2024"),
    ],
)
def test_identifiers_have_one_address(client, address, target):
    answer = client.get(address)
    if target is not None:
        assert (answer.status_code, answer.headers["location"]) == (301, target)
    else:
        assert answer.status_code in (200, 400, 404)


def test_papers_stand_in_the_order_of_their_address_and_gaps_are_told(client):
    text = client.get("/arxiv/hep-th/9901001,2405.00004v2,2405.09999,2405.00001,2405.00004").text
    assert shown(text) == ["hep-th/9901001", "2405.00004v2", "2405.00001", "2405.00004"]
    assert "Not found: 2405.09999" in text


def test_an_address_holds_two_hundred_papers(client):
    names = ",".join(f"2405.{number:05d}" for number in range(1, 202))
    assert client.get(f"/arxiv/{names}").status_code == 400


def test_a_version_has_its_own_page_links_and_answers(client):
    text = client.get("/arxiv/2405.00004v2").text
    assert 'href="https://arxiv.org/pdf/2405.00004v2"' in text
    assert "This is version 2;" in text
    assert 'action="/answers/2405.00004v2"' in text
    assert client.get("/arxiv/2405.00004v6").status_code == 404


def test_a_single_paper_tells_reference_managers_what_it_is(client):
    text = client.get("/arxiv/2405.00001").text
    assert '<meta name="citation_title" content="Rotary &lt;b&gt;positions&lt;/b&gt; &amp; $x_1 &lt; y$">' in text
    assert text.count('name="citation_author"') == 2
    assert '<meta name="citation_pdf_url" content="https://arxiv.org/pdf/2405.00001">' in text
    assert "citation_" not in client.get("/arxiv/2405.00001,2405.00002").text


def test_text_is_escaped_once(client):
    text = client.get("/arxiv/cs.AI+cs.LG?show=100").text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&amp;lt;" not in text and "&amp;amp;" not in text and "&amp;#" not in text
    assert 'translate="no">$x_1 &lt; y$</span>' in text
    assert ">$5 and $10" not in text and "$5 and $10" in text


def test_many_authors_hide_behind_et_al(client):
    text = client.get("/arxiv/2405.00003").text
    assert "et al. (20 more)" in text and "Author 59" in text
    assert "et al." not in client.get("/arxiv/2405.00001").text


def test_a_venue_has_its_groups_years_and_own_order(client):
    text = client.get("/venue/ICLR").text
    assert shown(text) == [f"note{number}@OpenReview" for number in range(3)]
    assert 'href="/venue/ICLR.2023"' in text
    assert shown(client.get("/venue/ICLR.2024?group=Oral").text) == ["note0@OpenReview"]


def test_search_finds_marks_and_takes_anything(client):
    answer = client.get("/arxiv/search?query=versions")
    assert shown(answer.text) == ["2405.00004"] and "<mark>versions</mark>" in answer.text
    assert "<mark>" not in client.get("/arxiv/search?query=versions&highlight=0").text
    assert client.get("/venue/search?query=paper").text.count("<article") == 3
    for odd in ("NEAR(", '"', "C++", "a:b", "*", "-", "\x00", "' OR 1=1", "日本", "cat:none.XX", "date:99999"):
        assert client.get("/arxiv/search", params={"query": odd}).status_code == 200


def test_search_results_do_not_move_when_papers_arrive(client, site):
    whole = shown(client.get("/arxiv/search?query=graphs&show=200").text)
    first = client.get("/arxiv/search?query=graphs").text
    following = html.unescape(re.search(r'rel="next" href="([^"]+)"', first).group(1))
    site.store.upsert([record("2405.00700", "graphs graphs graphs")])
    site.index.update(site.store)
    assert [*shown(first), *sum(chunks(client, following), [])] == whole
    assert "2405.00700" in shown(client.get("/arxiv/search?query=graphs&show=200").text)


@pytest.mark.parametrize(
    ("query", "target"),
    [
        ("2405.00001", "/arxiv/2405.00001"),
        ("https://arxiv.org/abs/2405.00004v2", "/arxiv/2405.00004v2"),
        ("https://doi.org/10.48550/arXiv.2405.00001 hep-th/9901001", "/arxiv/2405.00001,hep-th/9901001"),
        ("https://openreview.net/forum?id=aB_c-9d", "/venue/aB_c-9d@OpenReview"),
        ("https://aclanthology.org/2024.naacl-long.431/", "/venue/2024.naacl-long.431@ACL"),
    ],
)
def test_a_pasted_identifier_opens_the_paper(client, query, target):
    answer = client.get("/arxiv/search", params={"query": query})
    assert (answer.status_code, answer.headers["location"]) == (302, target)


def test_the_form_of_the_entrance_works_without_scripts(client):
    answer = client.get("/arxiv", params={"subjects": "cs.AI + cs.LG", "exclude": "cs.CY", "date": "2024-05-17"})
    assert answer.headers["location"] == "/arxiv/cs.AI+cs.LG-cs.CY?date=2024-05-17"
    assert client.get("/arxiv?subjects=cs.AI+cs.LG").headers["location"] == "/arxiv/cs.AI+cs.LG"
    assert client.get("/arxiv?include=cs.LG&include=cs.AI").headers["location"] == "/arxiv/cs.AI+cs.LG"
    home = client.get("/").text
    assert home.count('name="include"') > 140 and 'href="/venue/ICLR.2024"' in home


def test_reading_a_card_starts_nothing_and_asking_needs_a_token(client, site, token):
    assert client.get("/answers/2405.00001").status_code == 204
    assert client.post("/answers/2405.00001").status_code == 403
    assert client.post("/count/2405.00001", data={"kind": "pdf"}).status_code == 403
    assert site.queue.depth() == {}
    asked = client.post("/answers/2405.00001", data={"csrf_token": token})
    assert (asked.status_code, asked.headers["location"]) == (303, "/arxiv/2405.00001")
    assert client.post("/answers/2405.00001", data={"csrf_token": token}, headers=FRAGMENT).status_code == 202
    assert site.queue.depth() == {"answer": {"queued": 1}}
    assert "Waiting: 0 before" in client.get("/arxiv/2405.00001").text


def test_an_answer_is_streamed_resumed_rendered_and_marked(client, site, token):
    text = client.post("/answers/2405.00004v2", data={"csrf_token": token}, headers=FRAGMENT).text
    job = re.search(r'data-job="(\d+)"', text).group(1)
    done = asyncio.run(Worker(site.queue, {"answer": Answering(site.cards, site.engine).run}).drain("answer"))
    assert done == 1
    stream = client.get(f"/answers/2405.00004v2/stream?job={job}")
    assert (
        stream.headers["content-type"].startswith("text/event-stream") and stream.headers["x-accel-buffering"] == "no"
    )
    events = re.findall(r"id: (\d+)\nevent: text\n", stream.text)
    assert len(events) >= 6 and stream.text.rstrip().endswith("data: {}")
    rest = client.get(f"/answers/2405.00004v2/stream?job={job}", headers={"Last-Event-ID": events[2]})
    assert re.findall(r"id: (\d+)\n", rest.text) == events[3:]
    card = client.get("/answers/2405.00004v2").text
    assert "<em>first</em>" in card and 'translate="no">$a_1 * b_2$</span>' in card
    assert "Method, page 3" in card and "Scripted engine" in card and "may be wrong" in card
    latest = client.get("/arxiv/2405.00004").text
    assert "Made from version 2 of this paper; version 5 exists" in latest
    assert client.get("/answers/2405.00001/stream?job=" + job).status_code == 404


def test_a_count_comes_with_the_keywords_of_the_paper(client, token):
    answer = client.post("/count/2405.00004", data={"kind": "pdf"}, headers={"X-CSRF-Token": token}).json()
    assert answer["count"] == 1 and ["versions"] == [term for term, _ in answer["keywords"] if term == "versions"]
    assert client.post("/count/2405.00004", data={"kind": "no"}, headers={"X-CSRF-Token": token}).status_code == 400
    assert 'PDF <span class="n">1</span>' in client.get("/arxiv/2405.00004").text


def test_a_site_without_an_engine_has_no_button_to_ask(tmp_path):
    site = make_site(tmp_path, None)
    with TestClient(create_app(site)) as client:
        assert "/answers/" not in client.get("/arxiv/cs.AI").text
        assert client.get("/answers/2405.00001").status_code == 204


def test_the_chat_link_is_the_operators(tmp_path):
    site = make_site(tmp_path, Scripted(), chat_url="https://chat.example.org/?q={prompt}")
    with TestClient(create_app(site)) as client:
        token = re.search(r'name="csrf-token" content="([^"]+)"', client.get("/help").text).group(1)
        text = client.post("/answers/2405.00001", data={"csrf_token": token}, headers=FRAGMENT).text
    assert 'href="https://chat.example.org/?q=I%20have' in text and "%2Farxiv%2F2405.00001" in text


def test_pages_have_no_inline_script_or_style_and_no_foreign_file(client):
    for (
        address
    ) in "/ /arxiv/cs.AI /arxiv/2405.00001 /arxiv/search?query=a /venue/ICLR /settings /starred /help /no".split():
        text = client.get(address).text
        assert not re.search(r"\sstyle=|\son[a-z]+=|<style|javascript:", text.split("<section")[0])
        assert not re.search(r"<script(?![^>]*\ssrc=)", text)
        assert all(link.startswith("/") for link in re.findall(r'<(?:script|img|iframe)[^>]*src="([^"]+)"', text))
        for link in re.findall(r"<a [^>]*href=\"https?:[^>]*>", text):
            assert 'rel="noopener noreferrer"' in link


def test_static_files_are_kept_by_their_hash(client):
    assert "immutable" in client.get(assets.address("js/main.js")).headers["cache-control"]
    assert "immutable" not in client.get("/static/js/main.js").headers["cache-control"]
    assert client.get(assets.address("vendor/pdfjs/pdf.min.mjs")).headers["content-type"].startswith("text/javascript")


def test_the_first_part_of_a_list_is_small(site, client):
    site.store.upsert(synthetic.generate(1000, last_day=BEFORE.replace(day=15)))
    answer = client.get("/arxiv/cs+math+stat?date=2024-05-15", headers={"Accept-Encoding": "gzip"})
    assert len(shown(answer.text)) == 25 and answer.headers["content-encoding"] == "gzip"
    assert len(gzip.compress(answer.content, 5)) < 60_000


PATHS = "/arxiv/ /venue/ /rel/ /answers/ /arxiv/search?query= /arxiv/cs.AI?head= /arxiv/cs.AI?sort=preference&words="


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS.split()), st.text(max_size=40))
def test_no_address_breaks_the_site(client, path, text):
    assert client.get(path + quote(text, safe="/,+-@.")).status_code < 500
