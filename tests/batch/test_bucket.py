"""`imvar batch` with inputs and output in a bucket of a server on this machine, by s3fs and in processes of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import pyarrow.parquet
import pytest

from imvar import InputError, batch, load_image, save_image_embeds
from imvar.batch.journal import Journal
from imvar.batch.store import Store
from imvar.batch.worker import work
from imvar.cli import main
from tests.support.batches import make_shards, save_drawings, write_lines
from tests.support.ray_cluster import ENVIRONMENT, RayCluster

ROOT = Path(__file__).parents[2]
SETTINGS = {"n": 2, "steps": 2, "shard": 1}
OPTIONS = ["--checkpoint", "imvar-emoji", "-n", "2", "--steps", "2", "--shard", "1"]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The file system of a new server, for this process and the ones that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    command = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    account = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**account, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            patch.setenv(name, value)
        try:
            wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
            files = fsspec.filesystem("s3", use_listings_cache=False)
            files.mkdir("bucket")
            yield files
        finally:
            server.terminate()
            server.wait()
            log.close()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = save_drawings(tmp_path_factory.mktemp("inputs") / "photos", "fox", "panda", "cake")
    (folder / "broken.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory):
    """The files of a serial run into a folder."""
    out = tmp_path_factory.mktemp("expected")
    batch.run(photos, out, "imvar-emoji", **SETTINGS)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def wait_for(condition):
    """Wait until a condition holds; fail after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def contents(s3, name):
    """Return the content of each object below a name."""
    folder = f"bucket/{name}/"
    return {path.removeprefix(folder): s3.cat_file(path) for path in s3.find(folder)}


def start(*arguments, **environment):
    """Start an action of `imvar batch`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "imvar", "batch", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def end(process):
    """Return exit status, output and messages of a process at its end."""
    output, messages = process.communicate(timeout=120)
    return process.returncode, output, messages


@pytest.fixture
def call(capsys):
    """A function that runs an action in this process, and returns what `end` does."""

    def run(*arguments):
        status = main(["batch", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


# ---- the output


def test_run_is_equal_to_one_into_a_folder(s3, photos, expected):
    """Its two workers have a part each; the objects are the files of a serial run, and nothing else is left."""
    command = ("run", photos, "-o", "s3://bucket/run", *OPTIONS, "-j", "2", "--max-errors", 1)
    output = "4/4 shards, 6 images, 1 error: s3://bucket/run/manifest.jsonl, s3://bucket/run/errors.jsonl\n"
    assert end(start(*command)) == (0, output, "")
    assert contents(s3, "run") == expected


def test_ray(s3, photos, expected):
    """Of four workers, each with a part, two at a time have room; the third and the fourth begin when others end."""
    command = ("run", photos, "-o", "s3://bucket/ray", *OPTIONS, "-j", "4", "--max-errors", 1, "-q", "--engine", "ray")
    with RayCluster() as cluster:
        cluster.add_node("head", cpus=2)
        status, output, messages = end(start(*command, "--address", cluster.address, **ENVIRONMENT))
    assert (status, output) == (0, ""), messages
    assert contents(s3, "ray") == expected


def test_parts(s3, photos, expected, call):
    """Two processes make the shards of a part each; shards with a damaged marker or image are made again."""
    out = batch.plan(photos, "s3://bucket/parts", checkpoint="imvar-emoji", **SETTINGS).folder.parent
    processes = [start("join", out, "--part", f"{k}/2", "-q") for k in range(2)]
    assert [end(process) for process in processes] == [(0, "", "")] * 2
    assert contents(s3, "parts") == expected
    s3.pipe_file("bucket/parts/done/0000/0000001.json", b"{}")
    s3.rm_file("bucket/parts/images/0000/0000003/panda-1.png")
    status, output, _ = call("verify", out)
    assert (status, output) == (75, "done/0000/0000001.json\nimages/0000/0000003/panda-1.png\n")
    s3.pipe_file("bucket/parts/done/0000/0000002.json", s3.cat_file("bucket/parts/done/0000/0000000.json"))
    assert work(out)
    assert contents(s3, "parts") == expected


def test_killed_and_resumed(s3, photos, expected):
    """A worker is killed in a call: the journal says so, until the shard is made."""
    out = batch.plan(photos, "s3://bucket/killed", checkpoint="imvar-emoji", **SETTINGS).folder.parent
    process = start("join", out)
    wait_for(lambda: s3.exists("bucket/killed/journal/0000001.jsonl"))
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert json.loads(s3.cat_file("bucket/killed/journal/0000001.jsonl").splitlines()[1]) == {"begin": ["cake.png"]}
    assert not s3.exists("bucket/killed/manifest.jsonl")
    assert work(out)
    assert contents(s3, "killed") == expected


def test_fatal_input(s3, photos):
    """One in whose calls more processes died than `tries` is an error, by the journal."""
    out = batch.plan(photos, "s3://bucket/fatal", checkpoint="imvar-emoji", **SETTINGS).folder.parent
    for _ in range(2):
        Journal(Store(out), 2).note_begin(["fox.png"])
    assert work(out, tries=1)
    errors = [json.loads(line) for line in s3.cat_file("bucket/fatal/errors.jsonl").splitlines()]
    assert [(error["id"], error["error"]) for error in errors][1:] == [
        ("fox.png", "2 processes died while they worked on it")
    ]
    assert not s3.exists("bucket/fatal/journal")


def test_extend_retry_and_status(s3, tmp_path, call):
    folder = save_drawings(tmp_path / "photos", "fox")
    s3.pipe_file("bucket/more/boat.png", b"no image")
    made = batch.run(folder, "s3://bucket/python", "imvar-emoji", format="tar", **SETTINGS)
    assert (made.done, made.shards, str(made.manifest)) == (1, 1, "s3://bucket/python/manifest.jsonl")
    status, output, _ = call("extend", "s3://bucket/python", "s3://bucket/more", "--max-errors", 1)
    assert (status, output.partition(":")[0]) == (0, "2/2 shards, 2 images, 1 error")
    s3.put_file(str(save_drawings(tmp_path / "more", "boat") / "boat.png"), "bucket/more/boat.png")
    assert call("retry", "s3://bucket/python", "-q") == (0, "", "")
    assert call("status", "s3://bucket/python")[1].partition(":")[0] == "2/2 shards, 4 images"
    rows = s3.cat_file("bucket/python/manifest.jsonl").splitlines()
    assert [json.loads(row)["id"] for row in rows] == ["fox.png", "fox.png", "boat.png", "boat.png"]


# ---- the inputs


def made_of(inputs, out):
    """Return the digests of the images of a batch with seeds by position, and its number of errors."""
    rows = make_shards(batch.plan(inputs, out, checkpoint="imvar-emoji", seeds="same", metadata=False, **SETTINGS))
    return [row["sha256"] for row in rows if "sha256" in row], sum("error" in row for row in rows)


def test_inputs(s3, photos, tmp_path):
    """A folder, a pattern, tar and parquet files and a list give the images of the same inputs in a folder here."""
    s3.put(str(photos), "bucket/inputs/photos", recursive=True)
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, "photos")
    names = [path.name for path in sorted(photos.iterdir())]
    table = {"id": names, "image": [(photos / name).read_bytes() for name in names]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "photos.parquet")
    write_lines(tmp_path / "list.jsonl", *({"image": f"photos/{name}"} for name in names))
    for name in ("photos.tar", "photos.parquet", "list.jsonl"):
        s3.put_file(str(tmp_path / name), f"bucket/inputs/{name}")
    here = made_of(photos, tmp_path / "here")
    assert (len(here[0]), here[1]) == (6, 1)
    for number, name in enumerate(["photos", "photos/*.png", "photos.tar", "photos.parquet", "list.jsonl"]):
        assert made_of(f"s3://bucket/inputs/{name}", tmp_path / f"out-{number}") == here, name


def test_order_and_ids(s3, photos, tmp_path):
    """They are those of a folder here, with hidden files and the output left out."""
    names = ["10.png", "9.png", "a/x.png", "a/b/y.png", "a/2.png", ".hidden.png", ".git/z.png", "list.txt", "out/o.png"]
    for name in names:
        (path := tmp_path / "nested" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "fox.png", path)
    s3.put(str(tmp_path / "nested"), "bucket/nested", recursive=True)
    here = batch.plan(tmp_path / "nested", tmp_path / "nested" / "out", checkpoint="imvar-emoji")
    there = batch.plan("s3://bucket/nested", "s3://bucket/nested/out", checkpoint="imvar-emoji")
    ids = [[item["id"] for item in plan.shard(0)] for plan in (here, there)]
    assert ids[0] == ids[1] == ["9.png", "10.png", "a/2.png", "a/x.png", "a/b/y.png"]
    assert there.shard(0)[2]["image"] == "s3://bucket/nested/a/2.png"


def test_conditions(s3, photos, tmp_path):
    """Embeddings and the files of other conditions may be in a bucket, with the paths of a list from its folder on."""
    pipe = batch.pipeline_of(batch.plan(photos, tmp_path / "any", checkpoint="imvar-emoji", **SETTINGS))
    fox = photos / "fox.png"
    save_image_embeds(tmp_path / "fox.safetensors", pipe.encode_image(load_image(fox)))
    s3.put_file(str(tmp_path / "fox.safetensors"), "bucket/conditions/fox.safetensors")
    s3.put_file(str(fox), "bucket/conditions/photos/fox.png")
    here = [{"id": "a", "mix": {"fox.safetensors": 1}}, {"id": "b", "image": str(fox), "init": str(fox)}]
    there = [
        here[0],
        {"id": "b", "image": "../conditions/photos/fox.png", "init": "s3://bucket/conditions/photos/fox.png"},
    ]
    s3.put_file(str(write_lines(tmp_path / "there.jsonl", *there)), "bucket/conditions/list.jsonl")
    made = made_of(write_lines(tmp_path / "here.jsonl", *here), tmp_path / "here")
    assert made == made_of("s3://bucket/conditions/list.jsonl", tmp_path / "there")
    assert (len(made[0]), made[1]) == (4, 0)


# ---- refusals


def test_refusals(s3, photos, tmp_path, call):
    """Wrong buckets and accounts are usage errors, with one line that names the address."""
    run = ("run", photos, *OPTIONS, "--plan-only", "-o")
    account = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true", "AWS_ACCESS_KEY_ID": ""}
    stranger = end(start(*run, "s3://bucket/out", **account))
    assert stranger[2].endswith("got Unable to locate credentials; see docs/scale.md#buckets\n")
    missing = call(*run, "s3://no-such-bucket/out")
    assert "s3://no-such-bucket/out/plan/items-0.jsonl: expected a bucket that this account may use, got" in missing[2]
    inputs = call("run", "s3://no-such-bucket/photos", "-o", tmp_path / "out", *OPTIONS)
    assert "s3://no-such-bucket/photos: expected a folder, a file or a pattern, got no such file" in inputs[2]
    out = call("status", "s3://bucket/nothing")
    assert "s3://bucket/nothing: expected the output folder of imvar batch run, got a folder without a plan" in out[2]
    for status, output, messages in (stranger, missing, inputs, out):
        assert (status, output, messages.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://example.com/fox.png", "expected a path, or an address of an object store such as s3://bucket/photos"),
        ("other://bucket/photos", "expected a path, or an address of an object store such as s3://bucket/photos"),
        ("s3://", "expected an address such as s3://bucket/photos, got 's3://'"),
        ("s3:/bucket/photos", "expected an address such as s3://bucket/photos, got 's3:/bucket/photos'"),
        ("oss://bucket/photos", "expected the package ossfs for 'oss://bucket/photos', got none; pip install ossfs"),
    ],
)
def test_addresses(address, message, photos, tmp_path):
    with pytest.raises(InputError, match=f"inputs: {message}"):
        batch.plan(address, tmp_path / "out", checkpoint="imvar-emoji")
    with pytest.raises(InputError, match=f"out: {message}"):
        batch.plan(photos, address, checkpoint="imvar-emoji")


def test_file_addresses(photos, tmp_path):
    plan = batch.plan(f"file://{photos}", f"file://{tmp_path}/out", checkpoint="imvar-emoji")
    assert plan.folder == tmp_path / "out" / "plan"
    assert plan.shard(0) == batch.plan(photos, tmp_path / "out", checkpoint="imvar-emoji").shard(0)
