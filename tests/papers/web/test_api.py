"""The interface for programs says what the pages say, and what is wrong with a request."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient
from tests.papers.web.scene import BEFORE, DAY, Scripted, make_site, record, shown

from danlu.papers import lists, schema
from danlu.papers.categories import parse_expression, vocabulary
from danlu.papers.ids import parse_id
from danlu.papers.records import Listing
from danlu.papers.web.app import create_app

API = "/api/v1"
PATHS = [
    "/card/{paper_id}", "/categories", "/days/{expression}", "/health", "/keywords/{paper_id}", "/list/{expression}",
    "/papers", "/related/{paper_id}", "/search", "/venue/{slug}", "/venues",
]  # fmt: skip
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def get(client, path, **query):
    answer = client.get(API + path, params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    return answer.json()


def listed(found):
    return [each["paper"]["id"] for each in found["papers"]]


def whole(client, path):
    """The identifiers of a list, part by part."""
    found = []
    while path:
        part = client.get(path).json()
        found += listed(part)
        path = part["next"]
    return found


def test_a_list_is_that_of_the_page_in_its_order(client):
    found = get(client, "/list/cs.AI+cs.LG", show=500)
    assert listed(found) == shown(client.get("/arxiv/cs.AI+cs.LG?show=500").text)
    assert (found["expression"], found["day"], found["total"]) == ("cs.AI+cs.LG", str(DAY), len(listed(found)))
    assert found["next"] is None and [each["number"] for each in found["papers"]] == list(range(1, found["total"] + 1))
    by_id = {each["paper"]["id"]: each for each in found["papers"]}
    assert by_id["2405.00003"]["kind"] == "cross" and by_id["2405.00002"]["kind"] == "new"
    assert by_id["2405.00500"]["late"] and not by_id["2405.00001"]["late"]
    assert listed(get(client, "/list/cs.AI", date=str(BEFORE))) == ["2404.00001"]


def test_expressions_that_mean_the_same_have_the_same_list(client):
    first, *others = (
        get(client, f"/list/{quote(text)}") for text in ("cs.AI+cs.LG", "cs.LG,cs.AI", "cs.AI,cs.AI,cs.LG")
    )
    assert others == [first, first]
    both, minus = (set(listed(get(client, f"/list/{text}", show=500))) for text in ("cs.AI+cs.LG", "cs.AI+cs.LG-cs.CY"))
    assert both - minus == {"2405.00003"} and minus < both


def test_parts_make_up_the_list_although_papers_arrive_between_them(client, site):
    before = listed(get(client, "/list/cs.AI", show=500))
    first = get(client, "/list/cs.AI", show=10)
    site.store.upsert([record("2405.00009", "In front", listings=(Listing(DAY, "cs.AI", "new", 0),))])
    assert listed(first) + whole(client, first["next"]) == before
    after = listed(get(client, "/list/cs.AI", show=500))
    assert after.index("2405.00009") == 0 and after[1:] == before


@pytest.mark.parametrize(
    "path",
    ["/list/cs.AI?show=7", "/venue/ICLR.2024?show=1", "/search?query=graphs&show=20",
     "/search?query=a%26b+%2B+graphs&show=20", "/related/2405.00100?show=7"],
)  # fmt: skip
def test_next_leads_through_every_list(client, path):
    found = whole(client, API + path)
    total = client.get(API + path).json()["total"]
    assert len(found) == len(set(found)) == total > 2


def test_numbers_go_on_from_part_to_part_and_the_last_part_has_none_after_it(client):
    second = get(client, "/list/cs.AI", after=10, show=5)
    assert [each["number"] for each in second["papers"]] == [11, 12, 13, 14, 15]
    total = second["total"]
    assert get(client, "/list/cs.AI", after=total - 5, show=5)["next"] is None
    assert get(client, "/list/cs.AI", after=total - 6, show=5)["next"] is not None
    beyond = get(client, "/list/cs.AI", after=total + 5)
    assert beyond["papers"] == [] and beyond["next"] is None and beyond["total"] == total


def test_the_days_of_a_subject(client):
    assert [each["day"] for each in get(client, "/days/cs.AI")] == [str(DAY), str(BEFORE)]
    assert get(client, "/days/cs.AI", before=str(DAY)) == [{"day": str(BEFORE), "total": 1}]
    assert len(get(client, "/days/cs.AI", limit=1)) == 1
    assert get(client, "/days/q-bio.GN") == [] and get(client, "/list/q-bio.GN")["day"] is None


def test_papers_by_identifier_say_everything_that_is_stored(client):
    found = get(
        client, "/papers", ids="2405.00001,hep-th/9901001,2405.00004v2,2401.00001,note0@openreview,2405.00004v6"
    )
    assert [each["id"] for each in found["papers"]] == [
        "2405.00001", "hep-th/9901001", "2405.00004v2", "note0@OpenReview",
    ]  # fmt: skip
    assert found["missing"] == ["2401.00001", "2405.00004v6"]
    first, _, versioned, venue = found["papers"]
    assert first == {
        "id": "2405.00001", "version": 1, "title": "Rotary <b>positions</b> & $x_1 < y$",
        "abstract": "An abstract about rotary <b>positions</b> & $x_1 < y$.", "authors": ["Ada Lovelace", "Kurt Gödel"],
        "categories": ["cs.AI", "cs.LG"], "comment": "", "doi": "", "journal_ref": "", "license": "",
        "submitted_at": "2024-05-15T10:30:00Z", "updated_at": None, "announced_on": str(DAY), "withdrawn": False,
        "venues": [], "abs_url": "https://arxiv.org/abs/2405.00001", "pdf_url": "https://arxiv.org/pdf/2405.00001",
    }  # fmt: skip
    assert versioned["version"] == 5 and versioned["pdf_url"].endswith("2405.00004v2")
    assert venue["venues"] == [{"name": "ICLR", "year": 2024, "group": "Oral"}]


def test_venues_and_their_papers(client):
    venues = get(client, "/venues")
    assert [each["slug"] for each in venues] == ["ICLR.2024", "ICLR.2023"]
    assert venues[0] == {
        "slug": "ICLR.2024",
        "name": "ICLR",
        "year": 2024,
        "total": 3,
        "groups": {"Oral": 1, "Poster": 2},
    }
    latest = get(client, "/venue/iclr")
    assert latest["venue"] == venues[0] and listed(latest) == [f"note{n}@OpenReview" for n in range(3)]
    assert [each["group"] for each in latest["papers"]] == ["Oral", "Poster", "Poster"]
    assert listed(get(client, "/venue/ICLR.2024", group="Poster")) == ["note1@OpenReview", "note2@OpenReview"]
    assert listed(get(client, "/venue/ICLR.2023")) == ["old1@OpenReview"]


def test_a_search_finds_what_its_page_finds(client):
    for query in ("graphs", "rotary positions", 'ti:"filler number 105"', "+graphs -105"):
        page = shown(client.get("/arxiv/search", params={"query": query, "show": 500}).text)
        assert listed(get(client, "/search", query=query, branch="arxiv", show=500)) == page != []
    assert listed(get(client, "/search", query="paper", branch="venue")) and not get(client, "/search")["total"]
    newest = get(client, "/search", query="yesterday late", sort="date")
    assert listed(newest) == ["2405.00500", "2404.00001"]


def test_related_papers_and_keywords(client, site):
    found = listed(get(client, "/related/2405.00100"))
    assert "2405.00100" not in found and all(each.startswith("2405.001") for each in found)
    held = lists.papers(site.store, list(lists.find(site.store, [parse_id("2405.00100")]).values()))[0]
    words = get(client, "/keywords/2405.00100", count=3)
    assert (
        words == [{"term": each.term, "weight": each.weight} for each in site.index.keywords(held, 3)]
        and len(words) == 3
    )
    assert get(client, "/keywords/hep-th/9901001v1")[0]["term"] in ("strings", "old")


def test_a_card_is_read_and_never_started(client, site):
    assert client.get(f"{API}/card/2405.00004").status_code == 404
    held = lists.papers(site.store, list(lists.find(site.store, [parse_id("2405.00004")]).values()))[0]
    site.cards.write(held.pk, 5, "en", 0, "A note.", [])
    sources = [{"start": 1, "end": 5, "section": "Method \ud800", "page": 3}, {}]
    site.cards.write(held.pk, 5, "en", 1, "**Bold** \x1f<script>", sources)
    found = get(client, "/card/2405.00004")
    assert (found["paper"], found["version"], found["lang"], found["engine"]) == (
        "2405.00004",
        5,
        "en",
        "Scripted engine",
    )
    assert not found["complete"] and found["notes"] == ["A note."] and found["state"] == ""
    (answer,) = found["answers"]
    assert answer["number"] == 1 and answer["text"] == "**Bold** <script>" and answer["question"]
    assert answer["quotes"] == [{"section": "Method ", "page": 3}, {"section": "", "page": 0}]
    assert datetime.fromisoformat(answer["created_at"]).tzinfo == UTC
    assert client.get(f"{API}/card/2405.00004?v=4").status_code == 404
    assert client.get(f"{API}/card/2405.00004v4").status_code == 404
    assert get(client, "/card/2405.00004", v=5, lang="en") == found
    assert site.queue.depth() == {}


def test_the_subjects(client):
    found = {each["code"]: each for each in get(client, "/categories")}
    assert list(found) == list(vocabulary())
    assert found["cs.SY"]["alias_of"] == "eess.SY" and found["cs.AI"]["alias_of"] is None
    assert found["cs.AI"]["active"] and not found["hep-th"]["name"] == ""
    assert all(str(parse_expression(code)) for code in found)


@pytest.mark.parametrize(
    ("path", "status", "token"),
    [
        ("/list/cs.AI+cs.XX", 400, "cs.XX"),
        ("/list/cs.AI?date=2024-02-30", 400, "2024-02-30"),
        ("/list/cs.AI?date=1715904000", 400, "1715904000"),
        ("/list/cs.AI?show=501", 400, "501"),
        ("/list/cs.AI?after=-1", 400, "-1"),
        ("/list/cs.AI?snapshot=9999999999999999999999", 400, "9999999999999999999999"),
        ("/days/cs.AI?before=x", 400, "x"),
        ("/papers", 400, ""),
        ("/papers?ids=2405.00001,x", 400, "x"),
        ("/venue/ICLR.2024?group=Best", 400, "Best"),
        ("/search?sort=stars", 400, "stars"),
        ("/search?branch=cs", 400, "cs"),
        ("/related/x", 400, "x"),
        ("/keywords/2405.00001?count=0", 400, "0"),
        ("/card/2405.00001?lang=fr", 400, "fr"),
        ("/card/2405.00001?v=2", 400, "2"),
        ("/venue/NONE", 404, ""),
        ("/related/2401.00001", 404, ""),
        ("/card/2405.00001", 404, ""),
        ("/nothing", 404, ""),
        ("/card/%0Ax", 404, ""),
    ],
)
def test_what_is_wrong_comes_as_a_problem_with_the_part_that_cannot_be_read(client, path, status, token):
    answer = client.get(API + path)
    assert answer.status_code == status and answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "token"}
    assert (problem["type"], problem["status"], problem["token"]) == ("about:blank", status, token) and problem[
        "detail"
    ]


def test_a_limit_comes_as_a_problem_that_says_when_to_come_back(tmp_path):
    client = TestClient(create_app(make_site(tmp_path, None, limits={"searches_per_minute": 1})))
    assert client.get(f"{API}/search?query=x").status_code == 200
    answer = client.get(f"{API}/keywords/2405.00001")
    assert answer.status_code == 429 and answer.json()["status"] == 429 and int(answer.headers["Retry-After"]) > 0
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_the_interface_is_only_read(client, site, method):
    for path in ("/list/cs.AI", "/card/2405.00001", "/papers?ids=2405.00001"):
        answer = client.request(method, API + path)
        assert answer.status_code == 405 and "GET" in answer.headers["Allow"] and answer.json()["status"] == 405
    assert site.queue.depth() == {}


def test_a_site_without_an_engine_has_no_cards(tmp_path):
    client = TestClient(create_app(make_site(tmp_path, None)))
    assert client.get(f"{API}/card/2405.00001").status_code == 404


def test_halves_of_characters_in_the_database_do_not_break_an_answer(client, site):
    with site.store.writing() as connection:
        connection.execute(
            schema.paper.update().values(authors=["\ud800 Half"], extra={"pdf_url": "https://x.org/\udfff"})
        )
    (first, *_) = get(client, "/list/cs.AI")["papers"]
    assert first["paper"]["authors"] == [" Half"] and first["paper"]["pdf_url"] == "https://x.org/"


def test_the_description_names_every_address_and_describes_each(client):
    found = get(client, "/openapi.json")
    assert sorted(path.removeprefix(API) for path in found["paths"]) == [*PATHS]
    for path in found["paths"].values():
        assert list(path) == ["get"] and path["get"]["description"]
        assert set(path["get"]["responses"]) == {"200", "4XX"}
        assert set(path["get"]["responses"]["4XX"]["content"]) == {"application/problem+json"}
        for parameter in path["get"].get("parameters", []):
            assert parameter["description"]


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The interface of a site with an unfinished card, read from its own description."""
    site = make_site(tmp_path_factory.mktemp("api"), Scripted(), limits={"searches_per_minute": 10**9})
    site.cards.write(1, 1, "en", 1, "An answer.", [{"section": "Method", "page": 1}])
    yield schemathesis.openapi.from_asgi(f"{API}/openapi.json", create_app(site))
    site.close()


@pytest.mark.parametrize("path", PATHS)
def test_no_request_is_answered_but_as_described(described, path):
    statuses = set()

    @settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=described[API + path]["GET"].as_strategy())
    def answered(case):
        response = case.call_and_validate(checks=CHECKS)
        statuses.add(response.status_code)

    answered()
    assert statuses <= {200, 400, 404} and statuses
