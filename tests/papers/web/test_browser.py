"""The site in a real browser: a reader's day, with and without a mouse, scripts, light and width."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time

import pytest
import uvicorn
from tests.papers.web.scene import Scripted, make_site

from danlu.papers.pipeline import Answering
from danlu.papers.web.app import create_app
from danlu.papers.worker import Worker

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def small_pdf(pages=3):
    """A PDF with a line of text on each page."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(pages))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number in range(pages):
        text = f"BT /F1 24 Tf 72 700 Td (Page {number + 1} of a paper) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(text)} >>\nstream\n{text}\nendstream")
    body, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{each}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = (
        f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\n"
        f"startxref\n{len(body)}\n%%EOF"
    )
    return body + end.encode()


class Served:
    """A site with one worker on a port of its own."""

    def __init__(self, site):
        self.site = site
        config = uvicorn.Config(create_app(site), port=0, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self):
        work = Worker(self.site.queue, {"answer": Answering(self.site.cards, self.site.engine).run}, idle=0.05)
        task = asyncio.create_task(work.run())
        await self.server.serve()
        task.cancel()

    def __enter__(self):
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            if time.monotonic() > deadline:
                raise TimeoutError("the server did not start")
            time.sleep(0.02)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        self.site.close()


@pytest.fixture(scope="module")
def browser():
    if PROGRAM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=PROGRAM, args=OPTIONS.split())
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    engine = Scripted(("The *first* part, ", "with $a_1 * b_2$, ", "and the rest."), 0.12)
    with Served(make_site(tmp_path_factory.mktemp("site"), engine)) as served:
        yield served.url


class Reader:
    """A browser window whose console must stay silent."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(base_url=url, permissions=["clipboard-read", "clipboard-write"], **options)
        self.context.set_default_timeout(15_000)
        self.trouble = []
        self.expected = ()
        self.context.on("console", lambda said: self.trouble.append(said.text) if said.type == "error" else None)
        self.context.on("weberror", lambda error: self.trouble.append(str(error.error)))
        self.context.route(re.compile(r"^https://arxiv\.org/"), self._source)
        self.page = self.context.new_page()

    def _source(self, route):
        # Stands for the source: it lets other sites load its PDFs, but for one.
        if "2405.00003" in route.request.url:
            elsewhere = {"Access-Control-Allow-Origin": "https://elsewhere.example"}
            return route.fulfill(status=200, body=small_pdf(), content_type="application/pdf", headers=elsewhere)
        allowed = {"Access-Control-Allow-Origin": "*", "Content-Type": "application/pdf"}
        return route.fulfill(status=200, body=small_pdf(), headers=allowed)

    def memory(self, name):
        return json.loads(self.page.evaluate("name => localStorage.getItem('danlu.' + name)", name) or "null")


@pytest.fixture
def reader(browser, url):
    opened = Reader(browser, url, viewport={"width": 1280, "height": 900})
    yield opened
    opened.context.close()
    assert [text for text in opened.trouble if not any(part in text for part in opened.expected)] == []


def ids(page):
    return page.eval_on_selector_all(".paper", "all => all.map(each => each.dataset.id)")


def test_subjects_are_chosen_in_three_states_and_open_one_list(reader):
    page = reader.page
    page.goto("/")
    box = page.locator('.choice input[value="cs.AI"]')
    box.click()
    page.locator('.choice input[value="cs.CY"]').click()
    page.locator('.choice input[value="cs.CY"]').click()
    assert page.locator("#subjects").input_value() == "cs.AI-cs.CY"
    assert page.locator('.choice input[value="cs.CY"]').evaluate("box => box.indeterminate")
    for expected in (False, False, True):
        box.click()
        assert box.evaluate("box => box.checked") is expected
    page.reload()
    assert page.locator("#subjects").input_value() == "cs.AI-cs.CY"
    page.get_by_role("button", name="Open the list").click()
    page.wait_for_url("**/arxiv/cs.AI-cs.CY")
    assert "2405.00003" not in ids(page)


def test_the_whole_list_comes_while_scrolling_without_repeats(reader):
    page = reader.page
    page.goto("/arxiv/cs.AI")
    for _ in range(10):
        page.evaluate("window.scrollTo(0, document.documentElement.scrollHeight)")
        if page.locator(".end").count():
            break
        page.wait_for_timeout(200)
    found = ids(page)
    assert len(found) == len(set(found)) == 64


def test_formulas_are_typeset_and_then_the_words_may_be_translated(reader):
    page = reader.page
    page.goto("/arxiv/2405.00001")
    page.wait_for_selector(".title .katex")
    assert "notranslate" not in page.locator(".paper h2").get_attribute("class")
    assert page.locator(".tex").first.get_attribute("translate") == "no"
    assert page.locator(".tex [style]").count() > 0  # set by script, which the policy allows


def test_a_pdf_opens_from_its_source_stars_its_paper_and_folds(reader):
    page = reader.page
    page.goto("/arxiv/cs.AI")
    paper = page.locator('.paper[data-id="2405.00001"]')
    paper.locator('[data-do="pdf"]').click()
    paper.locator('.pdf-page[data-drawn="1"]').first.wait_for()
    assert "3 pages" in paper.locator(".pane-head").inner_text()
    dark = paper.locator("canvas").first.evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
        ".filter((value, place) => place % 4 === 0 && value < 128).length"
    )
    assert dark > 50
    assert paper.locator(".star").get_attribute("aria-pressed") == "true"
    page.wait_for_function("() => localStorage.getItem('danlu.cloud')")
    assert "rotary" in reader.memory("cloud")
    assert paper.locator('[data-do="pdf"] .n').inner_text() == "1"
    paper.locator("[data-fold]").last.click()
    assert paper.locator(".pane").count() == 0


def test_a_source_that_does_not_share_leaves_a_link(reader):
    reader.expected = ("CORS", "ERR_FAILED")
    page = reader.page
    page.goto("/arxiv/2405.00003")
    page.locator('[data-do="pdf"]').click()
    link = page.locator(".pane.pdf .pane-body a")
    link.wait_for()
    assert link.get_attribute("href") == "https://arxiv.org/pdf/2405.00003"


def test_an_answer_is_written_before_the_readers_eyes_and_kept(reader):
    page = reader.page
    page.goto("/arxiv/cs.LG")
    paper = page.locator('.paper[data-id="2405.00001"]')
    paper.locator('[data-do="ask"]').click()
    page.wait_for_function("() => document.querySelector('.answer.raw:not(:empty)')")
    assert paper.locator(".state").count() == 1
    page.wait_for_function("() => document.querySelectorAll('.questions li:not(.open)').length === 6", timeout=30_000)
    assert paper.locator(".answer em").count() == 6
    assert paper.locator(".answer .katex").first.inner_text()
    assert paper.locator(".state").count() == 0
    assert "Scripted engine" in paper.locator(".foot-card").inner_text()
    page.goto("/arxiv/2405.00001")
    assert page.locator(".inline-card .answer em").count() == 6


def test_stars_are_a_page_an_address_and_a_file(reader):
    page = reader.page
    page.goto("/arxiv/cs.AI")
    for name in ("2405.00104", "2405.00001"):
        page.locator(f'.paper[data-id="{name}"] .star').click()
    page.goto("/venue/ICLR.2024")
    page.locator('.paper[data-id="note1@OpenReview"] .star').click()
    page.goto("/arxiv/cs.AI")
    with page.expect_popup() as popup:
        page.locator('[data-do="export"]').click()
    shared = popup.value
    shared.wait_for_load_state()
    assert shared.url.endswith("/arxiv/2405.00001,2405.00104") and ids(shared) == ["2405.00001", "2405.00104"]
    address = shared.url
    shared.close()
    page.goto("/starred")
    page.wait_for_function("() => document.querySelectorAll('.paper').length === 3")
    assert ids(page) == ["note1@OpenReview", "2405.00001", "2405.00104"]
    with page.expect_download() as download:
        page.get_by_role("link", name="BibTeX").click()
    text = download.value.path().read_text()
    assert text.count("@") >= 3 and "2405.00104" in text
    page.locator('.paper[data-id="2405.00001"] .star').click()
    assert set(reader.memory("stars")) == {"note1@OpenReview", "2405.00104"}
    page.goto(address)
    assert ids(page) == ["2405.00001", "2405.00104"]


def test_all_that_a_browser_holds_goes_to_a_file_and_back(reader, tmp_path):
    page = reader.page
    page.goto("/arxiv/2405.00001")
    page.locator(".star").click()
    page.locator('.edit[data-do="include"][data-subject="cs.LG"]').click()
    page.goto("/settings")
    page.locator('[name="words"]').fill("rotary graphs")
    page.locator('[name="token"]').fill("secret")
    page.locator('[name="theme"]').select_option("dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    with page.expect_download() as download:
        page.locator('[data-do="export-all"]').click()
    file = tmp_path / "kept.json"
    download.value.save_as(file)
    assert "secret" not in file.read_text()
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator('[data-do="erase-all"]').click()
    assert reader.memory("stars") == {}
    page.locator("#import-all").set_input_files(file)
    page.wait_for_function("() => document.querySelector('[name=follow]').value === 'cs.LG'")
    assert set(reader.memory("stars")) == {"2405.00001"} and reader.memory("words") == "rotary graphs"
    wrong = b'{"format": "danlu-papers-1", "stars": {"a": "b"}}'
    page.locator("#import-all").set_input_files({"name": "x.json", "mimeType": "application/json", "buffer": wrong})
    page.wait_for_function("() => document.querySelector('#said').textContent.includes('stars')")
    assert set(reader.memory("stars")) == {"2405.00001"}


def test_preference_words_sort_a_list(reader):
    page = reader.page
    page.goto("/settings")
    page.locator('[name="words"]').fill("versions")
    page.locator('[name="words"]').blur()
    page.goto("/arxiv/cs.AI")
    page.locator("[data-preference]").click()
    page.wait_for_url("**words=versions*")
    assert ids(page)[0] == "2405.00004"


def test_finding_on_the_page_includes_excludes_and_hides(reader):
    page = reader.page
    page.goto("/arxiv/cs.AI")
    page.keyboard.press("Control+f")
    page.keyboard.type("versions ROTARY")
    hits = page.locator(".find .hits")
    assert hits.inner_text().startswith("2 of")
    assert page.evaluate("CSS.highlights.get('found').size") >= 2
    page.locator('.find [value="and"]').check()
    assert hits.inner_text().startswith("0 of")
    page.locator('.find [value="or"]').check()
    page.locator('.find [name="exclude"]').fill("rotary")
    page.locator('.find [name="only"]').check()
    assert page.eval_on_selector_all(".paper:not([hidden])", "all => all.map(each => each.dataset.id)") == [
        "2405.00004"
    ]
    page.keyboard.press("Escape")
    assert page.locator(".paper[hidden]").count() == 0


def test_copying_gives_the_whole_paper_and_leaves_the_selection(reader):
    page = reader.page
    page.goto("/arxiv/2405.00003")
    page.locator(".abstract").select_text()
    held = page.evaluate("getSelection().toString()")
    page.locator('[data-do="copy"]').click()
    page.wait_for_function("() => document.querySelector('#said').textContent === 'Copied.'")
    assert page.evaluate("getSelection().toString()") == held != ""
    text = page.evaluate("navigator.clipboard.readText()")
    assert "<script>alert(1)</script>" in text and "https://arxiv.org/pdf/2405.00003" in text
    assert "Author 39, Author 40," in text and "Author 59" in text


def test_everything_works_by_keys_alone(reader):
    page = reader.page
    page.goto("/arxiv/cs.AI")
    page.wait_for_selector("html.js")
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.locator(".paper.current").get_attribute("data-id") == "2405.00003"
    page.keyboard.press("j")
    page.keyboard.press("s")
    assert "2405.00004" in reader.memory("stars")
    page.keyboard.press("o")
    page.locator('.paper.current .pdf-page[data-drawn="1"]').first.wait_for()
    page.keyboard.press("o")
    assert page.locator(".pane").count() == 0
    page.keyboard.press("a")
    page.locator(".paper.current .card").wait_for()
    page.keyboard.press("Escape")
    assert page.locator(".pane").count() == 0
    page.keyboard.press("r")
    page.wait_for_url("**/rel/2405.00004")
    page.keyboard.press("/")
    page.keyboard.type("graphs number")
    page.keyboard.press("Enter")
    page.wait_for_url("**/arxiv/search?query=graphs+number")
    assert ids(page)
    page.keyboard.press("?")
    page.wait_for_url("**/help")


@pytest.mark.parametrize(
    "path", ["/", "/arxiv/cs.AI", "/arxiv/2405.00003", "/arxiv/search?query=graphs", "/settings", "/help"]
)
def test_a_phone_scrolls_in_one_direction(browser, url, path):
    phone = Reader(browser, url, viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    phone.page.goto(path)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 375
    phone.context.close()
    assert phone.trouble == []


def test_a_dark_system_gets_a_dark_page_unless_the_reader_wants_light(browser, url):
    night = Reader(browser, url, color_scheme="dark")
    night.page.goto("/arxiv/cs.AI")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    assert night.page.evaluate(ground) == "rgb(20, 24, 26)"
    night.page.goto("/settings")
    night.page.locator('[name="theme"]').select_option("light")
    assert night.page.evaluate(ground) == "rgb(251, 250, 248)"
    night.context.close()
    assert night.trouble == []


def test_without_scripts_lists_search_pdfs_and_answers_still_work(browser, url):
    plain = Reader(browser, url, java_script_enabled=False)
    page = plain.page
    page.goto("/")
    page.locator('.choice input[value="cs.AI"]').check()
    page.get_by_role("button", name="Open the list").click()
    assert page.url.endswith("/arxiv/cs.AI")
    first = page.locator(".paper").count()
    page.get_by_role("link", name="Next papers").click()
    assert page.locator(".paper .number").first.inner_text() == f"#{first + 1}"
    assert page.locator('[data-do="pdf"]').first.get_attribute("href").startswith("https://arxiv.org/pdf/")
    assert not page.locator(".star").first.is_visible()
    page.locator("#query").fill("rotary")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Ask").first.click()
    assert page.url.endswith("/arxiv/2405.00001") and page.locator(".inline-card").count() == 1
    plain.context.close()
