"""The dashboard in a real browser: by keyboard alone, in both colour schemes, on a phone.

Needs `pip install 'prefopt[browser]'` and Chromium.
"""

import shutil
import threading
import time

import pytest
import uvicorn

from prefopt.evaluation.dashboard import dashboard
from prefopt.evaluation.history import History
from tests.evaluation.test_history import evaluation, grades, judged, with_tasks

playwright = pytest.importorskip("playwright.sync_api", reason="needs prefopt[browser]")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.enable_socket,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]
PAGES = ("/", "/evaluations/2", "/evaluations/3?text=zzz", "/evaluations/1/pairs/7", "/changes/3/4",
         "/evaluations/99")  # fmt: skip
PHONE = {"width": 360, "height": 740}

# What Tab must reach, in this order.
FOCUSABLE = """() => [...document.querySelectorAll('a[href], input, select, button, summary')]
    .filter(e => e.getClientRects().length).map(e => e.outerHTML)"""
FOCUS = """async () => {
    // The page is scrolled to the focus before the next frame is drawn.
    await new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)));
    const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
    return {html: e === document.body ? '' : e.outerHTML,
            ring: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2,
            // What is scrolled to ends at a whole pixel.
            shown: box.width > 0 && box.top > -1 && box.bottom < innerHeight + 1 && box.left >= 0};
}"""
# Texts whose colour is too near to what is behind them: under 4.5 to 1, WCAG 2.2's AA.
PALE = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    const light = (...colours) => {
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
            .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const pale = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
        const of = node.parentElement;
        if (!node.textContent.trim() || !of.getClientRects().length || of.closest('style')) continue;
        const behind = [];
        for (let e = of; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
        const [low, high] = [light(...behind), light(...behind, getComputedStyle(of).color)]
            .sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) pale.push([node.textContent.trim().slice(0, 40), ratio]);
    }
    return pale;
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A dashboard that is served: 60 pairs, two evaluations with capabilities, two compared."""
    folder = tmp_path_factory.mktemp("served")
    pairs = [
        judged(i, 1 if i % 3 else -1, after=f"answer {i}", category="ab"[i % 2]) for i in range(60)
    ]
    pairs[17] = judged(17, 1, -1, after="the needle " + "long" * 80, category="b")
    with History(folder / "h.sqlite") as history:
        history.add(evaluation(folder / "first", pairs), series="bot")
        history.add(with_tasks(folder / "a", {"sums": 38, "rhymes": 30}), series="bot")
        history.add(with_tasks(folder / "b", {"sums": 12, "rhymes": 33}), series="bot")
        grades(history, folder, "c", {i: 1 for i in range(30)})
        server = uvicorn.Server(uvicorn.Config(dashboard(history), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    page = context.new_page()
    page.set_default_timeout(120_000)
    yield page
    context.close()


def tab_to(page, words):
    """Press Tab until the focus is on what holds these words."""
    for _ in range(200):
        page.keyboard.press("Tab")
        focus = page.evaluate(FOCUS)
        assert focus["html"], f"the page ended before {words!r}"
        assert focus["ring"], f"nothing shows the focus on {focus['html']}"
        assert focus["shown"], f"the focus is out of sight on {focus['html']}"
        if words in focus["html"]:
            return
    raise AssertionError(f"{words!r} is not reached")


def enter(page):
    with page.expect_navigation():
        page.keyboard.press("Enter")


def test_from_the_overview_to_a_pair_and_back_by_keyboard_alone(page, address):
    page.goto(address)
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUS)["shown"]
    assert "Skip to the content" in page.evaluate(FOCUS)["html"]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    tab_to(page, "/evaluations/1")
    enter(page)
    # Search and filter.
    tab_to(page, 'type="search"')
    page.keyboard.type("NEEDLE")
    tab_to(page, 'name="result"')
    page.keyboard.type("tie")
    tab_to(page, 'name="category"')
    page.keyboard.type("b")
    tab_to(page, 'type="checkbox"')
    page.keyboard.press("Space")
    tab_to(page, "Show")
    enter(page)
    assert page.get_by_role("status").inner_text() == "1 pair"
    assert page.get_by_role("searchbox").input_value() == "NEEDLE"
    # The next Tab is on what was found, not at the top of the page again.
    page.keyboard.press("Tab")
    assert "Pair 18" in page.evaluate(FOCUS)["html"]
    enter(page)
    # Both orders with their reasons.
    text = page.locator("main").inner_text()
    for words in ("After shown first: after is better", "because 1 with a first",
                  "Before shown first: before is better", "because -1 with b first",
                  "the needle"):  # fmt: skip
        assert words in text
    tab_to(page, "the pairs found")
    enter(page)
    assert page.get_by_role("status").inner_text() == "1 pair"
    assert page.get_by_role("combobox").first.input_value() == "tie"


def test_pages_are_turned_by_keyboard(page, address):
    page.goto(f"{address}/evaluations/1")
    tab_to(page, 'rel="next"')
    enter(page)
    assert "Page 2 of 2" in page.locator("main").inner_text()
    page.keyboard.press("Tab")
    assert "Pair 51" in page.evaluate(FOCUS)["html"]


@pytest.mark.parametrize("path", PAGES)
def test_tab_goes_through_a_page_in_the_order_it_is_read(page, address, path):
    page.goto(address + path)
    wanted, found = page.evaluate(FOCUSABLE), []
    for _ in wanted:
        page.keyboard.press("Tab")
        focus = page.evaluate(FOCUS)
        assert focus["ring"], focus
        assert focus["shown"], focus
        found.append(focus["html"])
    assert found == wanted


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, {"width": 1280, "height": 800}])
def test_pages_can_be_read_in_both_schemes_and_on_a_phone(browser, address, scheme, viewport):
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(120_000)
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    for path in PAGES:
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], path
        assert page.evaluate(PALE) == [], path
        behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (behind == "rgb(18, 22, 27)") == (scheme == "dark")
        small = page.evaluate(
            "[...document.querySelectorAll('button, select, input[type=search]')]"
            ".filter(e => e.getBoundingClientRect().height < 24).length"
        )
        assert small == 0, "too small for a finger"
    context.close()
    assert [words for words in refused if "404" not in words] == []
