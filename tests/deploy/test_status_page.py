"""What a person sees of a server in a browser, with scripts and without."""

from collections.abc import Iterator

import pytest
from deploy.browser import PICTURE, browser
from playwright.sync_api import Browser, expect
from store.running_server import WAIT_S, running_server
from store.sample_blocks import NAMESPACE, keys_of, sample_blocks, sample_key

from tq_store.client import StoreClient
from tq_store.server.app import Server

WAIT_MS = 1000 * WAIT_S


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


def url_of(server: Server) -> str:
    assert server.metrics_url is not None
    return server.metrics_url.removesuffix("metrics")


def use(server: Server, num_missing: int) -> None:
    """Three hits, and some misses."""
    blocks = sample_blocks(3, 1 << 20)
    with StoreClient(server.address) as client:
        client.put(blocks)
        client.lookup([*keys_of(blocks), *(sample_key(100 + number) for number in range(num_missing))])
        list(client.get(keys_of(blocks)))


def test_numbers_stay_fresh_without_a_reload_and_old_ones_are_marked(chromium: Browser) -> None:
    problems: list[str] = []
    asked: set[str] = set()
    page = chromium.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.add(request.url))
    with running_server(metrics_port=0) as server:
        url = url_of(server)
        use(server, 1)
        page.goto(url)
        ratio = page.locator("section.number", has_text="prefix hit ratio")
        expect(ratio).to_contain_text("75.0% since the start", timeout=WAIT_MS)
        page.evaluate("window.wasLoadedOnce = true")
        use(server, 7)
        expect(ratio).to_contain_text("42.9% since the start", timeout=WAIT_MS)
        assert page.evaluate("window.wasLoadedOnce")
        tiers = page.locator("section", has_text="share of gets")
        expect(tiers).to_contain_text("memory")
        expect(page.locator("section", has_text="Top namespaces")).to_contain_text(NAMESPACE.hex()[:12])
        expect(page.locator("svg.history path.first")).to_have_count(1)
        expect(page.locator("#stale")).to_be_hidden()
        # the sheet was let in: without it a cell has no border
        assert (
            page.locator("tbody td").first.evaluate("cell => getComputedStyle(cell).borderTopWidth") == "1px"
        )
        sections = page.locator("section.number").all()
        assert len({round(box["y"]) for section in sections if (box := section.bounding_box())}) == 1
        assert page.locator("rect.part").first.evaluate("bar => bar.getBoundingClientRect().width") > 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert problems == []
        assert asked == {url, *(url + name for name in ("status.css", "status.js", "status"))}
    expect(page.locator("#stale")).to_be_visible(timeout=WAIT_MS)
    expect(ratio).to_contain_text("42.9% since the start")
    page.close()


def test_the_numbers_need_no_script(chromium: Browser) -> None:
    context = chromium.new_context(java_script_enabled=False, viewport={"width": 390, "height": 800})
    page = context.new_page()
    with running_server(metrics_port=0) as server:
        use(server, 1)
        page.goto(url_of(server))
        # the page fetches itself again
        expect(page.locator("main")).to_contain_text("75.0% since the start", timeout=WAIT_MS)
        expect(page.locator("section", has_text="p50 below")).to_contain_text("calls in flight")
    context.close()


def test_nothing_from_elsewhere_is_let_into_the_page(chromium: Browser) -> None:
    page = chromium.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    with running_server(metrics_port=0) as server:
        page.goto(url_of(server))
        page.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "window.wasInjected = true";
                document.body.append(script);
                const image = '<img src="http://127.0.0.1:1/x" onerror="window.wasInjected = true">';
                document.body.insertAdjacentHTML("beforeend", image);
            }"""
        )
        page.wait_for_function("() => document.images[0].complete")
        assert page.evaluate("window.wasInjected === undefined")
        assert any("Content Security Policy" in problem for problem in problems)
    page.close()


def test_the_picture_in_the_documents_is_small() -> None:
    data = PICTURE.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 150_000
