"""The status page of a busy server in a real browser; `python -m tests.deploy.browser` takes its picture."""

import hashlib
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, sync_playwright

from tq_connectors.codec import pack_pages
from tq_kernels import PageLayout, preset
from tq_store.keys import BlockKey

PICTURE = Path(__file__).parents[2] / "deploy" / "status-page.png"


@contextmanager
def browser() -> Iterator[Browser]:
    """The system's Chromium, without a window."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser")
    path = next(filter(None, map(shutil.which, names)), None)
    assert path is not None, "no Chromium on the PATH; run tests/install_tools.sh"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


def take_picture() -> None:
    """Of a server with three models in it, after half a minute of saving and loading."""
    from store.running_server import running_server
    from store.sample_blocks import sample_key

    from tq_store.client import StoreClient

    settings = {"metrics_port": 0, "memory_budget_bytes": 160 << 20, "disk_budget_bytes": 1 << 30}
    with (
        TemporaryDirectory() as disk,
        running_server(disk_path=Path(disk), **settings) as server,
        StoreClient(server.address) as client,
        browser() as chromium,
    ):
        page = chromium.new_page(viewport={"width": 1100, "height": 900}, color_scheme="light")
        assert server.metrics_url is not None
        page.goto(server.metrics_url.removesuffix("/metrics"))
        for turn in range(120):
            namespace = hashlib.sha256(b"%d" % (turn % 7 % 3)).digest()
            keys = [sample_key(turn * 2 % 60 + page, namespace) for page in range(4)]
            client.put([(key, _block(key)) for key in keys])
            client.lookup([*keys, sample_key(10**6 + turn, namespace)])
            list(client.get(keys[: 1 + turn // 10 % 4]))
            page.wait_for_timeout(150 + 20 * (turn // 8 % 8))
        page.screenshot(path=PICTURE, full_page=True)


def _block(key: BlockKey) -> bytes:
    """A block in the shape of a small model, 4 bits a value: 1 MiB."""
    layout = PageLayout(spec=preset("tq4"), head_dim=128, num_kv_heads=8, page_tokens=64)
    return pack_pages(layout, 16, key, random.Random(key).randbytes(16 * layout.page_bytes))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    take_picture()
