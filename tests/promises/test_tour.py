"""The notebook docs/tour.ipynb runs in a kernel, and the images in it are those that its cells make."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"
PNG = re.compile(r"data:image/png;base64,([^\"]+)")
TOLERANCE = 2  # mean difference in levels of 255: machines round differently


def shown(cell):
    """Return the images that a cell shows, in order, as arrays."""
    data = [output["data"] for output in cell.get("outputs", []) if "data" in output]
    encoded = [png for each in data for png in PNG.findall(each.get("text/html", "")) or [each.get("image/png")] if png]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))), dtype=np.float32) for png in encoded]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The cells as they are in the file, and after they ran."""
    folder = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("PYTHONPATH", str(TOUR.parents[1]))
        committed, new = (nbformat.read(TOUR, as_version=4) for _ in range(2))
        client = NotebookClient(new, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
        client.execute()
    return list(zip(committed.cells, new.cells, strict=True))


def test_the_images_in_the_file_are_those_that_the_cells_make(runs):
    for old, new in runs:
        assert len(shown(old)) == len(shown(new)), old.source
        for a, b in zip(shown(old), shown(new), strict=True):
            assert np.abs(a - b).mean() < TOLERANCE, old.source
    assert sum(len(shown(cell)) for _, cell in runs) > 40


def test_no_cell_warns(runs):
    kinds = {(output.output_type, output.get("name")) for _, cell in runs for output in cell.get("outputs", [])}
    assert kinds == {("stream", "stdout"), ("execute_result", None), ("display_data", None)}


def test_the_file_holds_nothing_of_the_machine_that_made_it():
    text = TOUR.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|Users)/", text)
    assert nbformat.read(TOUR, as_version=4).metadata.keys() == {"kernelspec", "language_info"}
