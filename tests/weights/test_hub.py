"""Checkpoints are fetched from a hub, here one on loopback, by processes of their own with an empty cache.

Nothing is patched: what is tested is that imvar, huggingface_hub and its HTTP library work together.
"""

import json
import re
import shutil
import socket

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import imvar
import imvar.cli
from tests.support.loopback_hub import environment, run, serve

WEIGHTS = {
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "image_encoder": "model",
    "safety_checker": "model",
}
FETCHED = {
    "feature_extractor/preprocessor_config.json",
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "model_index.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
PRELUDE = """
import json, sys, warnings
import imvar
from imvar import StableDiffusionImageVariationPipeline as Pipeline, UNet2DConditionModel as UNet

results = {}

def attempt(case, load):
    try:
        out = load()
    except imvar.CheckpointError as error:
        results[case] = str(error)
    else:
        unet = getattr(out, "unet", out)
        results[case] = unet.conv_in.bias[0].item() if isinstance(unet, UNet) else type(out).__name__
"""
EPILOGUE = "\nprint(json.dumps(results))\n"
ONLINE = """
attempt("pipeline", lambda: Pipeline.from_pretrained("owner/name"))
attempt("revision", lambda: UNet.from_pretrained("owner/name", subfolder="unet", revision="v2.0"))
attempt("part", lambda: UNet.from_pretrained("owner/parts", subfolder="unet"))
attempt("scheduler", lambda: imvar.PNDMScheduler.from_pretrained("owner/parts", subfolder="scheduler"))
attempt("pickle", lambda: UNet.from_pretrained("owner/pickles", subfolder="unet", use_safetensors=False))
attempt("without checker", lambda: Pipeline.from_pretrained("owner/unchecked", safety_checker=None))
attempt("file", lambda: UNet.from_single_file("owner/files/unet/diffusion_pytorch_model.safetensors",
                                              config="owner/files", subfolder="unet"))
attempt("link", lambda: UNet.from_single_file(
    "https://huggingface.co/owner/links/resolve/v2.0/unet/diffusion_pytorch_model.safetensors?download=true",
    config="owner/files", subfolder="unet"))
attempt("blob", lambda: UNet.from_single_file(
    "https://hf.co/owner/links/blob/main/unet/diffusion_pytorch_model.safetensors", config="owner/files",
    subfolder="unet"))
attempt("token", lambda: UNet.from_pretrained("owner/private", subfolder="unet", token="hf_secret", cache_dir="cache"))
attempt("older token", lambda: UNet.from_pretrained("owner/private", subfolder="unet", use_auth_token="hf_secret",
                                                    cache_dir="other", resume_download=True, mirror="tuna"))
attempt("wrong token", lambda: UNet.from_pretrained("owner/private", subfolder="unet", token="hf_wrong"))
attempt("nothing cached", lambda: UNet.from_pretrained("owner/cut", subfolder="unet", local_files_only=True))
attempt("no such revision", lambda: Pipeline.from_pretrained("owner/name", revision="v9"))
attempt("no such variant", lambda: UNet.from_pretrained("owner/name", subfolder="unet", variant="fp16"))
attempt("no such subfolder", lambda: imvar.PNDMScheduler.from_pretrained("owner/name", subfolder="nowhere"))
attempt("no weights", lambda: Pipeline.from_pretrained("owner/incomplete"))
attempt("no config", lambda: UNet.from_pretrained("owner/incomplete", subfolder="vae"))
attempt("no index", lambda: Pipeline.from_pretrained("owner/empty"))
attempt("no such file", lambda: UNet.from_single_file("owner/name/nothing.safetensors"))
"""
OFFLINE = """
attempt("pipeline", lambda: Pipeline.from_pretrained("owner/name"))
attempt("part of it", lambda: UNet.from_pretrained("owner/name", subfolder="unet"))
attempt("revision", lambda: UNet.from_pretrained("owner/name", subfolder="unet", revision="v2.0"))
attempt("part", lambda: UNet.from_pretrained("owner/parts", subfolder="unet"))
attempt("pickle", lambda: UNet.from_pretrained("owner/pickles", subfolder="unet"))
attempt("without checker", lambda: Pipeline.from_pretrained("owner/unchecked", safety_checker=None))
attempt("file", lambda: UNet.from_single_file("owner/files/unet/diffusion_pytorch_model.safetensors",
                                              config="owner/files", subfolder="unet"))
attempt("another part", lambda: imvar.AutoencoderKL.from_pretrained("owner/parts", subfolder="vae"))
attempt("never fetched", lambda: Pipeline.from_pretrained("owner/other"))
"""
FORCED = """
attempt("first", lambda: UNet.from_pretrained("owner/parts", subfolder="unet"))
attempt("cached", lambda: UNet.from_pretrained("owner/parts", subfolder="unet", force_download=False))
pipe = Pipeline.from_pretrained("owner/parts", force_download=True, safety_checker=None, requires_safety_checker=False)
attempt("pipeline", lambda: pipe)
attempt("part", lambda: UNet.from_pretrained("owner/parts", subfolder="unet", force_download=True))
attempt("config", lambda: imvar.PNDMScheduler.from_pretrained("owner/parts", "scheduler", force_download=True))
attempt("file", lambda: UNet.from_single_file("owner/parts/unet/diffusion_pytorch_model.safetensors",
                                              config="owner/parts", subfolder="unet", force_download=True))
"""
FORCED_OFFLINE = """
attempt("forced", lambda: UNet.from_pretrained("owner/parts", subfolder="unet", force_download=True))
attempt("cached", lambda: UNet.from_pretrained("owner/parts", subfolder="unet"))
"""
REFUSED = """
for status in 401, 403, 404, 429, 500:
    attempt(str(status), lambda: Pipeline.from_pretrained(f"owner/status-{status}"))
attempt("no such repository", lambda: Pipeline.from_pretrained("owner/nothing"))
attempt("not a name", lambda: Pipeline.from_pretrained("owner/a name"))
attempt("cut off", lambda: UNet.from_pretrained("owner/cut", subfolder="unet"))
attempt("no token", lambda: UNet.from_pretrained("owner/name", subfolder="unet", token=True))
attempt("web page", lambda: Pipeline.from_pretrained("owner/page"))
try:
    Pipeline.from_pretrained("owner/list")
except TypeError:
    results["error in a library"] = "TypeError"
"""
UNREACHABLE = """
attempt("cached", lambda: UNet.from_pretrained("owner/name", subfolder="unet"))
attempt("not cached", lambda: Pipeline.from_pretrained("owner/other"))
attempt("partly cached", lambda: imvar.AutoencoderKL.from_pretrained("owner/parts", subfolder="vae"))
attempt("only locally", lambda: Pipeline.from_pretrained("owner/other", local_files_only=True))
"""


@pytest.fixture(scope="module")
def hub(checkpoint, tmp_path_factory):
    """A hub with the tiny checkpoint, its tag v2.0 with another bias, incomplete ones, and ones that fail."""
    main = shutil.copytree(checkpoint, tmp_path_factory.mktemp("hub") / "main")
    for part, name in WEIGHTS.items():
        pickle = "pytorch_model" if name == "model" else name
        torch.save(load_file(main / part / f"{name}.safetensors"), main / part / f"{pickle}.bin")
    (main / "montage.jpg").write_bytes(b"0" * 1000)
    set_bias(main, 1.0)
    tag = shutil.copytree(main, main.with_name("v2.0"))
    set_bias(tag, 2.0)
    incomplete = shutil.copytree(main, main.with_name("incomplete"))
    for path in (*incomplete.glob("unet/diffusion*"), incomplete / "vae" / "config.json"):
        path.unlink()
    (main.with_name("empty")).mkdir()
    with serve() as hub:
        for name in ("name", "parts", "pickles", "unchecked", "files", "links", "private", "cut"):
            hub.repositories[f"owner/{name}"] = {"main": main, "v2.0": tag}
        hub.repositories["owner/incomplete"] = {"main": incomplete}
        hub.repositories["owner/empty"] = {"main": main.with_name("empty")}
        hub.tokens["owner/private"] = "hf_secret"
        hub.failures = {f"owner/status-{status}": status for status in (401, 403, 404, 429, 500)}
        hub.failures |= {"owner/page": b"<html>Accept our terms to go online</html>", "owner/list": b"[]"}
        hub.failures["owner/cut"] = "unet/diffusion_pytorch_model.safetensors"
        yield hub


def set_bias(folder, value):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = value
    save_file(tensors, path)
    torch.save(tensors | {"conv_in.bias": tensors["conv_in.bias"] + 10}, path.with_suffix(".bin"))


def outcomes(script, address, home, **variables):
    """Run the attempts of `script` in a child process; return a loaded UNet's bias, or an error's message, by case."""
    folder = home / "elsewhere"
    folder.mkdir(exist_ok=True)
    done = run("-c", PRELUDE + script + EPILOGUE, env=environment(address, home, **variables), cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    """What was loaded with the hub at hand, the files that were fetched, and the home with the cache."""
    home = tmp_path_factory.mktemp("home")
    del hub.fetched[:]
    return outcomes(ONLINE, hub.address, home), list(hub.fetched), home


@pytest.fixture
def nobody():
    """The address of a port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_checkpoints_are_fetched(online):
    results = online[0]
    assert results["pipeline"] == results["part"] == results["file"] == results["without checker"] == 1
    assert results["revision"] == results["link"] == 2
    assert results["blob"] == 1
    assert results["pickle"] == 11
    assert results["scheduler"] == "PNDMScheduler"


def test_token_and_cache(online):
    results, _, home = online
    assert results["token"] == results["older token"] == 1
    assert list((home / "elsewhere" / "cache").glob("models--owner--private/snapshots/*/unet/config.json"))
    assert_words(results["wrong token"], ["owner/private: expected a repository that is public or", "401"])


def test_only_needed_files_are_fetched(online):
    def fetched(repository):
        names = [name.removeprefix(f"{repository}/") for name in online[1] if name.startswith(f"{repository}/")]
        return set(names), len(names)

    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert fetched("owner/name") == (FETCHED, len(FETCHED) + 1)  # and the weights of v2.0; its config is the same file
    assert fetched("owner/parts") == (unet | {"scheduler/scheduler_config.json"}, 3)
    assert fetched("owner/pickles") == ({"unet/config.json", "unet/diffusion_pytorch_model.bin"}, 2)
    assert fetched("owner/unchecked")[0] == {name for name in FETCHED if "safety_checker" not in name}
    assert fetched("owner/links")[0] == {"unet/diffusion_pytorch_model.safetensors"}
    assert "unet/diffusion_pytorch_model.safetensors" in fetched("owner/files")[0]
    assert not [name for name in fetched("owner/files")[0] if name.endswith((".bin", ".jpg"))]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nothing cached", ["owner/cut: ", "no copy", "local_files_only", "connect once", "folder of a copy"]),
        ("no such revision", ["owner/name (revision v9): expected a revision", "404"]),
        ("no such variant", ["owner/name: ", "diffusion_pytorch_model.fp16.safetensors"]),
        ("no such subfolder", ["owner/name: expected the file nowhere/scheduler_config.json"]),
        ("no weights", ["owner/incomplete: ", "diffusion_pytorch_model.safetensors"]),
        ("no config", ["owner/incomplete: expected the file vae/config.json"]),
        ("no index", ["owner/empty: expected the file model_index.json"]),
        ("no such file", ["owner/name: expected the file nothing.safetensors"]),
    ],
)
def test_what_is_missing_is_named(online, case, words):
    assert_words(online[0][case], words)


def test_offline_from_the_cache(hub, online):
    del hub.fetched[:]
    results = outcomes(OFFLINE, hub.address, online[2], HF_HUB_OFFLINE="1")
    for case in ("pipeline", "part of it", "part", "without checker", "file"):
        assert results[case] == 1, case
    assert results["revision"] == 2
    assert results["pickle"] == 11
    assert_words(results["another part"], ["owner/parts: ", "incomplete", "diffusion_pytorch_model.safetensors"])
    assert_words(results["never fetched"], ["owner/other: ", "no copy", "HF_HUB_OFFLINE", "connect once"])
    assert hub.fetched == []


def test_a_forced_download_ignores_the_cache(hub, nobody, tmp_path):
    del hub.fetched[:]
    results = outcomes(FORCED, hub.address, tmp_path)
    assert results == {"first": 1, "cached": 1, "pipeline": 1, "part": 1, "config": "PNDMScheduler", "file": 1}
    assert hub.fetched.count("owner/parts/unet/diffusion_pytorch_model.safetensors") == 4
    assert hub.fetched.count("owner/parts/scheduler/scheduler_config.json") == 3  # and with those of the file
    for address, offline, reason in (nobody, "0", "ConnectError"), (hub.address, "1", "HF_HUB_OFFLINE"):
        results = outcomes(FORCED_OFFLINE, address, tmp_path, HF_HUB_OFFLINE=offline)
        assert_words(results["forced"], ["owner/parts: expected a connection to the hub, for force_download", reason])
        assert results["cached"] == 1


def test_refusals_are_named(hub, tmp_path):
    results = outcomes(REFUSED, hub.address, tmp_path)
    access = "expected a repository that is public or that your token may read"
    assert_words(results["401"], [f"owner/status-401: {access}", "401 Unauthorized", "token="])
    assert_words(results["403"], [f"owner/status-403: {access}", "403 Forbidden", "token="])
    assert_words(results["404"], ["owner/status-404: expected a repository on the hub", "404 Not Found"])
    assert_words(results["no such repository"], ["owner/nothing: expected a repository on the hub", "404"])
    assert_words(results["429"], ["owner/status-429: expected a response from the hub", "429 Too Many Requests"])
    assert_words(results["500"], ["owner/status-500: expected a response from the hub", "500 Internal Server Error"])
    assert_words(results["not a name"], ["owner/a name: expected a folder, a hub id"])
    assert_words(results["cut off"], ["owner/cut: expected a complete download", "connect"])
    assert_words(results["no token"], ["owner/name: ", "token=True"])
    assert_words(results["web page"], ["owner/page: ", "connection to the hub", "JSONDecodeError"])
    assert results["error in a library"] == "TypeError"  # which is not taken for an unreachable hub


def test_nothing_listens(online, nobody, tmp_path):
    results = outcomes(UNREACHABLE, nobody, online[2])
    assert results["cached"] == 1
    assert_words(results["not cached"], ["owner/other: ", "connection to the hub", "ConnectError", "connect once"])
    assert_words(results["partly cached"], ["owner/parts: ", "connection to the hub", "ConnectError"])
    assert_words(results["only locally"], ["owner/other: ", "local_files_only"])


def test_command_line(hub, nobody, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    command = ["-m", "imvar", "vary", "photo.png", "-n", "1", "--steps", "1", "--checkpoint"]
    env = environment(hub.address, tmp_path)
    done = run(*command, "owner/name", "--revision", "v2.0", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "variations" / "photo-0.png").size == (128, 128)
    done = run(*command[:-1], env=environment(nobody, tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    name = "imvar: lambdalabs/sd-image-variations-diffusers (revision v2.0): "
    assert_words(done.stderr, [name, "ConnectError", "connect once", "imvar-emoji needs no download"])


def assert_words(text, words):
    assert isinstance(text, str), text
    for word in words:
        assert word in text


@pytest.mark.parametrize("load", ["from_pretrained", "from_single_file"])
@pytest.mark.parametrize("rest", ["x", "owner/name/blob/main/x.ckpt"])
def test_credentials_in_a_link_are_not_shown(load, rest):
    link = f"https://user:hf_SECRET@huggingface.co/{rest}?token=hf_QUERY&download=true"
    with pytest.raises(imvar.CheckpointError) as error:
        getattr(imvar.StableDiffusionImageVariationPipeline, load)(link)
    assert "huggingface.co" in str(error.value)
    assert not re.search("SECRET|QUERY|user", str(error.value))


def test_credentials_in_a_link_are_not_shown_on_the_command_line(capsys, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    link = "https://user:hf_SECRET@huggingface.co/x?token=hf_QUERY"
    assert imvar.cli.main(["vary", str(tmp_path / "photo.png"), "-o", str(tmp_path), "--checkpoint", link]) == 1
    assert "huggingface.co" in (shown := capsys.readouterr().err)
    assert not re.search("SECRET|QUERY", shown)
