"""Fixtures of the tests of the command line."""

import pytest
from PIL import Image

from imvar import cli


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.jpg"
    Image.radial_gradient("L").convert("RGB").resize((90, 60)).save(path)
    return path


@pytest.fixture
def run(checkpoint, tmp_path):
    """Return a function that runs `imvar vary` with two steps in float32 and saves to tmp_path/out."""

    def run(*args, out="out", common=("--steps", "2", "--dtype", "float32", "--device", "cpu")):
        return cli.main(["vary", "--checkpoint", str(checkpoint), "-o", str(tmp_path / out), *common, *map(str, args)])

    return run
