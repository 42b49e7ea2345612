"""The wheel and the sdist are complete, work where there is no checkout, and have the metadata of a release."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from html.parser import HTMLParser

import pytest
import yaml
from readme_renderer.markdown import render

from tests.support.wheel import ROOT, copy_source, run

HOME = "https://github.com/someone/imvar"
SAMPLE = """
[A `link`](docs/control.md#regions), ![an image](docs/images/regions.png), `x[0](docs/control.md)`
<img alt="docs/images/levels.png" width="9" src="docs/images/levels.png">

```python
y = x[0](docs/control.md)
```
"""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Addresses(HTMLParser):
    """The addresses of links and images in a page of HTML."""

    def __init__(self, page: str):
        super().__init__()
        self.links: list[str] = []
        self.images: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in ("a", "img"):
            (self.links if tag == "a" else self.images).append(dict(attrs)["href" if tag == "a" else "src"])


@pytest.fixture(scope="session")
def wheel(distributions):
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(distributions):
    (path,) = distributions.glob("*.tar.gz")
    return path


def files(folder):
    """Return the relative paths of the files in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- contents


def test_building_warns_of_no_package(distributions):
    assert "absent from the `packages` configuration" not in (distributions / "build.log").read_text()


def test_the_wheel_has_the_package_and_no_other_file(distributions, wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"imvar/{name}" for name in files(distributions / "source" / "imvar")}


def test_the_sdist_has_all_that_the_tests_need(distributions, sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    folders = {"imvar", "tests", "scripts", "docs"}
    needed = {name for name in files(distributions / "source") if name.partition("/")[0] in folders}
    assert needed | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "setup.py"} <= names
    assert {name for name in names if name.endswith((".pyc", ".npy"))} == set()


def test_checks_of_other_tools(wheel, sdist, tmp_path):
    run(sys.executable, "-m", "check_wheel_contents", wheel, cwd=tmp_path)
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=tmp_path)


# ---- installed


def test_variations_from_the_wheel(installed_python, tmp_path):
    """In an empty folder, with an empty home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "empty").mkdir()

    def run_here(*command):
        return run(*command, cwd=tmp_path / "empty", HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")

    imvar = installed_python.parent / "imvar"
    assert run_here(installed_python, "-c", "import imvar; print(imvar.__file__)").startswith(str(imvar.parents[1]))
    assert run_here(imvar, "--version") == f"imvar {PROJECT['version']}\n"
    run_here(imvar, "vary", "--checkpoint", "imvar-emoji", "-n", "1", "--steps", "1")
    assert len(list((tmp_path / "empty" / "variations").glob("*.png"))) == 13
    assert files(tmp_path / "home") == set()


def test_tests_run_from_the_sdist(installed_python, sdist, tmp_path):
    shutil.unpack_archive(sdist, tmp_path)
    (folder,) = tmp_path.iterdir()
    test = "tests/image/test_pixel_values.py"
    assert " passed" in run(installed_python, "-m", "pytest", "-p", "no:cacheprovider", test, cwd=folder)


# ---- metadata


def metadata(folder, home):
    """Return the metadata and the rendered description of a source that has SAMPLE in its README."""
    source = copy_source(folder / "source")
    project = source / "pyproject.toml"
    project.write_text(re.sub(r'(?m)^home = ".*?"', f'home = "{home}"', project.read_text()))
    readme = source / "README.md"
    readme.write_text(readme.read_text() + SAMPLE)
    write = "import sys; from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel(sys.argv[1])"
    run(sys.executable, "-c", write, folder, cwd=source)
    (file,) = folder.glob("*.dist-info/METADATA")
    message = message_from_bytes(file.read_bytes())
    description = message.get_payload(decode=True).decode()
    assert description.count("x[0](docs/control.md)") == 2  # code stays as it is
    return message, render(description)


def test_addresses_without_a_home(tmp_path):
    """There are no addresses within the repository, since none is known."""
    message, page = metadata(tmp_path, "")
    assert "Author: the imvar maintainers" in message.as_string()
    assert {line.partition(",")[0] for line in message.get_all("Project-URL")} == {"Checkpoint", "Reference"}
    assert Addresses(page).images == []
    assert all(link.startswith(("https://", "#")) for link in Addresses(page).links)
    assert "A <code>link</code>" in page


def test_addresses_from_the_home(tmp_path):
    message, page = metadata(tmp_path, HOME)
    tag = f"v{PROJECT['version']}"
    assert f"Homepage, {HOME}" in message.get_all("Project-URL")
    assert f"Changelog, {HOME}/blob/{tag}/CHANGELOG.md" in message.get_all("Project-URL")
    found = Addresses(page)
    assert f"{HOME}/blob/{tag}/docs/control.md#regions" in found.links
    assert {f"{HOME}/raw/{tag}/docs/images/{name}.png" for name in ("regions", "levels")} <= set(found.images)
    for address in found.images + found.links:
        assert address.startswith(("https://", "#"))
        path = address.partition("#")[0].removeprefix(f"{HOME}/blob/{tag}/").removeprefix(f"{HOME}/raw/{tag}/")
        assert path == "" or path.startswith("https://") or (ROOT / path).exists()


def test_the_citation(tmp_path):
    """scripts/check_package validates it by the schema."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    first = [reference["authors"][0]["family-names"] for reference in citation["references"]]
    assert first == ["Pinkney", "Rombach", "Radford"]
