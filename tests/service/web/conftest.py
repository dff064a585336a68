"""A browser, and a service for it to visit."""

import contextlib
import socket
import threading
import time

import pytest
import uvicorn
from PIL import Image

from tests.service.web.browser import open_browser
from tests.service.web.fake_service import RAW, REFINED, fake_service
from tests.service.web.playground import READY


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A tab of a headless Chromium."""
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@contextlib.contextmanager
def running(app):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            server.force_exit = True  # the browser keeps its connections open
            thread.join()


@pytest.fixture
def serve_app():
    """A function that serves an application for the length of the test and returns its URL."""
    with contextlib.ExitStack() as servers:
        yield lambda app: servers.enter_context(running(app))


@pytest.fixture(scope="session")
def photograph(tmp_path_factory):
    """A file with blue above, a green slope below, and a red block; 320x240 px."""
    image = Image.new("RGB", (320, 240), (90, 140, 220))
    for x in range(320):
        image.paste((60, 120 + x // 4, 60), (x, 150 + x // 8, x + 1, 240))
    image.paste((200, 40, 30), (64, 96, 128, 160))
    path = tmp_path_factory.mktemp("photographs") / "a blue day.png"
    image.save(path)
    return path


@pytest.fixture
def open_page(browser, serve_app):
    """A function that opens the playground of a service with these models."""

    def make(*models, **changes):
        url = serve_app(fake_service(models or (RAW, REFINED), **changes))
        browser.open(url + "/")
        browser.wait_for(READY)
        return browser

    return make


@pytest.fixture
def page(open_page):
    return open_page()
