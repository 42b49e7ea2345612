"""The page of `imvar web` in a real browser: from a dropped image to a download with its record."""

import os
import re
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import zipfile
from urllib.parse import urlsplit

import pytest

from imvar import bundled_examples

pytest.importorskip("gradio", reason="no gradio: pip install 'imvar[web]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium in PATH")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
FOX, PANDA = (bundled_examples()[name] for name in ("fox-noto", "panda-fluent-flat-held-out"))
SECONDS = 60
COUNT_PREVIEWS = """
previews = 0
new MutationObserver(() => previews = Math.max(previews, document.querySelectorAll(".previews img").length)).observe(
    document.body, {childList: true, subtree: true})
"""


@pytest.fixture(scope="module")
def outside():
    """Return a list to which each connection is added that the server opens to other machines."""
    connections = []

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self):
            connections.append(self.request.recv(200))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connections_and_address = connections, f"http://127.0.0.1:{server.server_address[1]}"
        yield connections_and_address
        server.shutdown()


@pytest.fixture(scope="module")
def served(tmp_path_factory, outside):
    """Run `imvar web`, and return its address, process and temporary folder."""
    folder = tmp_path_factory.mktemp("web")
    proxies = dict.fromkeys(["http_proxy", "https_proxy", "all_proxy"], outside[1]) | {"no_proxy": "127.0.0.1"}
    env = os.environ | proxies | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "imvar", "web", "--port", "0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, line + process.stdout.read()
        yield address[0], process, folder
        process.kill()


@pytest.fixture(scope="module")
def context():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser.new_context(accept_downloads=True)
        browser.close()


@pytest.fixture
def page(served, context):
    """Open the page, and check when it is closed that nothing was requested from elsewhere."""
    page, hosts = context.new_page(), set()
    page.set_default_timeout(SECONDS * 1000)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(served[0])
    page.evaluate(COUNT_PREVIEWS)
    yield page
    page.close()
    assert hosts <= {"127.0.0.1", None}, hosts  # None: data and blob addresses


def set_number(page, label, value):
    page.get_by_label(f"number input for {label}").fill(str(value))
    page.keyboard.press("Tab")


def upload(page, name, path):
    page.locator(f"#{name} input[type=file]").set_input_files(path)
    page.locator(f"#{name} img").wait_for()


def make(page):
    page.get_by_role("button", name="Make variations").click()


def test_an_image_is_varied_and_downloaded_with_its_settings(page, tmp_path):
    upload(page, "image", FOX)
    page.get_by_role("button", name="Settings").click()
    set_number(page, "Number of images", 2)
    set_number(page, "Steps", 6)
    make(page)
    page.locator("#gallery img").nth(1).wait_for()
    assert page.evaluate("previews") == 2
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    download.value.save_as(archive := tmp_path / "all.zip")
    with zipfile.ZipFile(archive) as file:
        assert len(file.namelist()) == 2


def test_an_error_is_shown_without_paths(page):
    make(page)
    page.get_by_text("Image: expected an image to vary, got none").wait_for()


def test_it_ends_by_a_signal_and_leaves_no_file(served, outside):
    _, process, folder = served
    assert any(folder.rglob("*.png"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    assert not any(folder.iterdir())
    assert not outside[0]
