"""The server of scripts/serve.py: a process of its own, and requests by HTTP."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from imvar import InputError, batch, load_image
from imvar.records.files import read_record
from tests.support.batches import drawing, images_of, make_shards, save_drawings

pytest.importorskip("prometheus_client", reason="no prometheus_client: pip install 'imvar[serve]'")
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BATCH = 2
OPTIONS = {"batch": BATCH, "queue": 5, "max-n": 6, "max-side": 64, "max-upload": 1, "max-pixels": 1}


@contextmanager
def serving():
    """Run the server, and yield its address and process."""
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, ROOT / "scripts" / "serve.py", "--checkpoint", "imvar-emoji", "--port", "0", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, line + process.stdout.read()
        try:
            yield address[0], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address():
    with serving() as (address, _):
        yield address


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_drawings(tmp_path_factory.mktemp("inputs"), "fox", "panda")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


FOX = "fox.png", png(drawing("fox"))


def post(address, image=FOX, **settings):
    """Send an image with settings, and return the response."""
    settings = {name: str(value) for name, value in settings.items()}
    return httpx.post(f"{address}/variations", files={"image": image}, data=settings, timeout=60, trust_env=False)


def metrics(address):
    """Return the metrics by name, those of requests by status."""
    text = httpx.get(f"{address}/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.labels.get("status", sample.name): sample.value for sample in samples if "le" not in sample.labels}


def wait_until_waiting(address, count):
    """Return once that many requests wait in the queue."""
    while metrics(address)["imvar_queue_length"] != count:
        time.sleep(0.02)


@contextmanager
def busy(address):
    """Keep the pipeline busy with a request of several calls; yield threads, and the future response."""
    with ThreadPoolExecutor(8) as threads:
        calls = metrics(address)["imvar_batch_fill_count"]
        long = threads.submit(post, address, n=3 * BATCH, steps=10)
        while metrics(address)["imvar_batch_fill_count"] == calls:  # until the first call is done
            time.sleep(0.02)
        yield threads, long


def files_of(response):
    """Return the images in a response, in the order of their seeds."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "image/png":
        return [response.content]
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        return [archive.read(name) for name in archive.namelist()]


@pytest.mark.parametrize("n", [1, BATCH, BATCH + 1])
def test_files_are_those_of_a_batch(address, photos, tmp_path, n):
    """In every byte, with others in the call that differ in n, or are broken."""
    settings = {"n": n, "seed": 7, "steps": 1, "guidance": 4.5}
    plan = batch.plan(photos, tmp_path, checkpoint="imvar-emoji", batch=BATCH, seeds="same", **settings)
    make_shards(plan)
    expected = images_of(tmp_path)
    paths = sorted(photos.iterdir())
    with ThreadPoolExecutor(8) as threads:
        made = [threads.submit(post, address, (path.name, path.read_bytes()), **settings) for path in paths]
        more = threads.submit(post, address, **settings | {"n": 1, "seed": 3})
        broken = threads.submit(post, address, ("broken.png", FOX[1][:-30]), **settings)
    assert {(path.name, k) for path in paths for k in range(n)} == expected.keys()
    for path, response in zip(paths, made, strict=True):
        files = files_of(response.result())
        assert files == [expected[path.name, k] for k in range(n)]
        assert response.result().headers["imvar-seeds"] == ",".join(str(7 + k) for k in range(n))
        assert response.result().headers["imvar-flagged"] == ",".join(["false"] * n)
    assert files_of(more.result())[0] not in expected.values()
    assert broken.result().status_code == 400


def test_requests_of_equal_settings_share_a_call(address):
    with busy(address) as (threads, long):
        before = metrics(address)
        equal = [threads.submit(post, address, steps=1, seed=seed) for seed in range(BATCH)]
        wait_until_waiting(address, BATCH)
        other = threads.submit(post, address, steps=2)
    responses = [future.result() for future in (long, *equal, other)]
    assert {response.status_code for response in responses} == {200}
    after = metrics(address)
    calls, fill = (after[name] - before[name] for name in ("imvar_batch_fill_count", "imvar_batch_fill_sum"))
    assert (calls, fill) in [(4, 3 + 1 / BATCH), (3, 2 + 1 / BATCH)]
    assert after["imvar_call_seconds_count"] == after["imvar_batch_fill_count"]


def test_a_full_queue_and_clients_that_hang_up(address):
    with busy(address) as (threads, long):
        gone = socket.create_connection(address.removeprefix("http://").split(":"))
        request = httpx.Request("POST", f"{address}/variations", files={"image": FOX}, data={"steps": "1"})
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        gone.sendall(f"POST /variations HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        waiting = [threads.submit(post, address, steps=1) for _ in range(OPTIONS["queue"] - 1)]
        wait_until_waiting(address, OPTIONS["queue"])
        refused = post(address, steps=1)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"].startswith("queue: expected room, got 5 requests that wait; try again in ")
        gone.close()
        wait_until_waiting(address, OPTIONS["queue"] - 1)
        assert not long.done()
        waiting.append(threads.submit(post, address, steps=1))
    assert [future.result().status_code for future in waiting] == [200] * OPTIONS["queue"]
    assert metrics(address)["499"] == 1
    assert metrics(address)["429"] == 1


def test_sigterm():
    """What has begun is finished, and what waits is refused."""
    with serving() as (address, process), busy(address) as (threads, long):
        waiting = threads.submit(post, address, steps=1)
        wait_until_waiting(address, 1)
        process.send_signal(signal.SIGTERM)
        assert waiting.result().status_code == 503
        assert len(files_of(long.result())) == 3 * BATCH
        assert process.wait(60) == 0
        assert process.stdout.read() == ""


def test_the_record_of_an_image(address, tmp_path):
    (tmp_path / "made.png").write_bytes(post(address, steps=1, size=32).content)
    record = read_record(tmp_path / "made.png")
    assert record["inputs"][0]["name"] == "fox.png"
    assert [record["settings"][name] for name in ("height", "width", "num_inference_steps")] == [32, 32, 1]


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_that_is_too_large(address, chunked):
    if chunked:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        start = [b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n']
        content = iter([*start, *[b"0" * 2**16] * 17, b"\r\n--b--\r\n"])
        response = httpx.post(f"{address}/variations", content=content, headers=headers, trust_env=False)
    else:
        response = post(address, ("large.png", bytes(2**20)))
    assert response.status_code == 413
    assert response.json()["error"].startswith("upload: expected at most 1048576 bytes, got 1")


@pytest.mark.parametrize("data", [b"", b"no image", FOX[1][:-30], png(Image.new("L", (1100, 1000)))])
def test_an_image_that_cannot_be_used(address, data, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", OPTIONS["max-pixels"] * 500_000)
    file = io.BytesIO(data)
    file.name = "a.png"
    with pytest.raises(InputError) as error:
        load_image(file)
    response = post(address, ("a.png", data))
    assert (response.status_code, response.json()) == (400, {"error": str(error.value)})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"n": 7}, "n: expected an integer from 1 to 6, got '7'"),
        ({"steps": 0}, "steps: expected an integer from 1 to 200, got '0'"),
        ({"guidance": "nan"}, "guidance: expected a number from 0 to 100, got 'nan'"),
        ({"seed": 2**63}, f"seed: expected an integer from 0 to {2**63 - 1}, got '{2**63}'"),
        ({"seed": 2**63 - 1, "n": 2}, f"seed: expected an integer from 0 to {2**63 - 2}, got {2**63 - 1}"),
        ({"size": 72}, "size: expected sides up to 64, got '72'"),
        ({"size": "8x9"}, "size: expected 512 or 384x512 (height first), multiples of 8 below 65536, got '8x9'"),
        ({"stesp": 1}, "form: expected fields among image, n, steps, guidance, seed, size, got 'stesp'"),
    ],
)
def test_settings_that_are_refused(address, settings, error):
    response = post(address, **settings)
    assert (response.status_code, response.json()) == (400, {"error": error})


HEAD = b'--b\r\ncontent-disposition: form-data; name="image"'
FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", FORM),
        (b"--b\r\n", FORM),
        (b"\0--c\r\n\r\n\r\n--b", FORM),
        (HEAD + b"\r\n\r\nfox.png\r\n--b--\r\n", FORM),
        (HEAD + b'; filename="a.png"\r\n\r\ncut', FORM),
        (2 * (HEAD + b'; filename="a.png"\r\n\r\n0\r\n') + b"--b--\r\n", FORM),
        (FOX[1], "multipart/form-data"),
        (FOX[1], "image/png"),
        (b"image=fox.png", "application/x-www-form-urlencoded"),
    ],
)
def test_bodies_without_a_form(address, body, kind):
    response = httpx.post(f"{address}/variations", content=body, headers={"content-type": kind}, trust_env=False)
    assert response.status_code == 400
    assert "error" in response.json()


def test_health(address):
    response = httpx.get(f"{address}/health", trust_env=False)
    assert (response.status_code, response.json()) == (200, {"model": "imvar-emoji", "ready": True, "batch": BATCH})
    assert httpx.get(f"{address}/variations", trust_env=False).status_code == 405


def test_the_client_of_the_page(address, photos, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "my.jpg").write_bytes(FOX[1])
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000", address), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-7.png", "my-8.png", "my.jpg"]
    assert read_record(tmp_path / "my-8.png")["seed"] == 8
