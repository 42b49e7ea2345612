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

import numpy as np
import pytest
from PIL import Image

from imvar import StableDiffusionImageVariationPipeline, bundled_examples, load_image
from imvar.records.files import read_record
from imvar.records.record import differences

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
    page.locator(f"#{name} img[src*='/file=']").wait_for()  # uploaded, not only shown


def paint(page, name):
    """Paint a line across the canvas of an editor."""
    canvas = page.locator(f"#{name} canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 50, y)
    page.mouse.down()
    page.mouse.move(x + 50, y, steps=5)
    page.mouse.up()


def make(page):
    """Press the button."""
    page.get_by_role("button", name="Make variations").click()


def make_images(page):
    """Press the button, and wait for other images; an error fails at once."""
    address = "document.querySelector('#gallery img')?.src"
    before = page.evaluate(address)
    make(page)
    toast = "document.querySelector('[data-testid=toast-body]')"
    page.wait_for_function(f"before => ({address} ?? before) != before || {toast}", arg=before)
    assert page.get_by_test_id("toast-body").all_inner_texts() == []


def download(page, folder):
    """Return the files that the page offers."""
    with page.expect_download() as offered:
        page.get_by_role("button", name="Download").click()
    folder.mkdir(exist_ok=True)
    offered.value.save_as(path := folder / offered.value.suggested_filename)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as file:
            file.extractall(folder)
    return sorted(folder.glob("*.png"))


def test_an_image_is_varied_downloaded_with_its_record_and_made_again(page, tmp_path):
    page.get_by_role("button", name="Settings").click()
    set_number(page, "Number of images", 2)
    set_number(page, "Steps", 6)
    set_number(page, "Guidance", 4.5)
    upload(page, "image", FOX)  # last, as it takes a request: by then the page has the numbers
    make_images(page)
    assert page.evaluate("previews") == 2
    paths = download(page, tmp_path)
    records = sorted(map(read_record, paths), key=lambda record: record["call"]["row"])
    pipe = StableDiffusionImageVariationPipeline.from_pretrained("imvar-emoji")
    pipe.enable_vae_slicing()
    seeds = [record["seed"] for record in records]
    call = {"num_inference_steps": 6, "guidance_scale": 4.5, "num_images_per_prompt": 2, "seed": seeds}
    expected = pipe.records(load_image(FOX), **call)
    for record, own in zip(records, expected, strict=True):
        assert [line for line in differences(record, own) if not line.startswith("machine.")] == []
        assert record["exact"]

    path = tmp_path / f"fox-noto-{seeds[1]}.png"
    page.get_by_role("button", name="Make an image again").click()
    page.locator("#again input[type=file]").set_input_files(path)
    page.get_by_text(f"It was made from: {FOX.name} (Image)").wait_for()
    make(page)
    page.get_by_text(f"The image of seed {seeds[1]} is {path.name}, made again.").wait_for()
    download(page, tmp_path / "again")
    again = tmp_path / "again" / path.name
    assert Image.open(again).tobytes() == Image.open(path).tobytes()


def test_two_images_are_mixed_in_a_painted_region_and_a_start_image_is_repainted(page, tmp_path):
    upload(page, "image", FOX)
    page.get_by_role("button", name="Settings").click()
    set_number(page, "Number of images", 1)
    set_number(page, "Steps", 6)
    page.get_by_role("button", name="Mix in a second image").click()
    set_number(page, "Share of the second image", 0.25)
    upload(page, "second", PANDA)
    make_images(page)
    [mixed] = download(page, tmp_path / "mixed")
    inputs = [(entry["name"], entry["weight"]) for entry in read_record(mixed)["inputs"]]
    assert inputs == [(FOX.name, 0.75), (PANDA.name, 0.25)]

    paint(page, "region")
    page.get_by_role("button", name="Start from an image").click()
    upload(page, "start", PANDA)
    paint(page, "mask")
    make_images(page)
    painted, mask = download(page, tmp_path / "painted")
    roles = [(entry["role"], entry.get("mask") is not None) for entry in read_record(painted)["inputs"]]
    assert roles == [("region", False), ("region", True), ("init", False), ("mask", False)]
    area = np.asarray(Image.open(mask).resize((64, 64), Image.Resampling.NEAREST)) > 127
    start = np.asarray(load_image(PANDA).resize((64, 64), Image.Resampling.LANCZOS))
    assert 0.02 < area.mean() < 0.5
    assert area[32, 32]
    assert not area[2, 2]
    repainted = np.asarray(Image.open(painted))
    assert np.array_equal(repainted[:16], start[:16])
    assert not np.array_equal(repainted[area], start[area])


def test_what_is_wrong_is_said_on_the_page_without_paths(page, tmp_path):
    make(page)
    page.get_by_text("Image: expected an image to vary, got none").wait_for()
    (tmp_path / "broken.png").write_bytes(FOX.read_bytes()[:200])
    page.locator("#image input[type=file]").set_input_files(tmp_path / "broken.png")
    page.locator("#image img").wait_for(state="attached")
    make(page)
    error = page.get_by_text("expected a")
    error.wait_for()
    assert "/" not in error.inner_text(), error.inner_text()


def test_it_ends_by_a_signal_and_leaves_no_file(served, outside):
    _, process, folder = served
    assert any(folder.rglob("*.png"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    assert not any(folder.iterdir())
    assert not outside[0]
