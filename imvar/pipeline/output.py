"""The output of a call of the pipeline, which can save its images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import numpy as np
from PIL.Image import Image
from torch import Tensor

from ..atomic.file import atomic_write, write_new
from ..checks import as_path, check_type
from ..errors import InputError, describe, invalid
from ..image import numpy_to_pil
from ..outputs import Output
from ..records.files import FORMATS, write_image
from ..records.record import Record
from .arguments import check_option
from .figures import figures
from .records import CallRecords

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # with a default, which typing has from Python 3.13 on

    ImagesT = TypeVar("ImagesT", bound=list[Image] | np.ndarray | Tensor, default=list[Image])
else:
    from typing import TypeVar

    ImagesT = TypeVar("ImagesT")


@dataclass(eq=False)
class StableDiffusionPipelineOutput(Output, Generic[ImagesT]):
    """`images`: a list of PIL images, an array (b, h, w, 3), a tensor (b, 3, h, w), or latents.

    `nsfw_content_detected`: one flag per image, or None without a safety checker. By attribute only: `seeds`, one per
    image if the call had seeds; `scores`, one dictionary per image from imvar's safety checker, with
    `special_scores` and `concept_scores` by concept number (above 0 is a hit) and the hits in `special_care` and
    `bad_concepts`; `records`, how each image was made.
    """

    attribute_only: ClassVar[tuple[str, ...]] = ("seeds", "scores", "recorded")
    images: ImagesT
    nsfw_content_detected: list[bool] | None = None
    seeds: list[int] | None = None
    scores: list[dict[str, Any]] | None = None
    recorded: CallRecords | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.images, list):
            for row, image in enumerate(self.images):
                if isinstance(image, Image):
                    # a tag, for when callers sort the list or drop some of it
                    image.imvar_row = id(self.recorded), row  # type: ignore[attr-defined]

    @property
    def records(self) -> list[Record] | None:
        """How each image was made, as `save` writes it into files; None for latents.

        The first time, this computes the digest of the checkpoint's files, which takes seconds for large ones that the
        hub's cache does not name by it.
        """
        return None if self.recorded is None else self.recorded.finished()

    def save(
        self, folder: str | Path, *, overwrite: bool = False, format: str = "png", metadata: bool = True
    ) -> list[Path]:
        """Write each image into `folder`, which is created if needed, and return the paths.

        The names are those of `imvar vary`: the name of the photo and the seed, such as `fox-7.png`; without a photo's
        name "image", without a seed the number of the image. An existing file is kept, and the new one gets a number,
        as in `fox-7-2.png`, unless `overwrite`. `format`: "png", "webp" or "jpeg". `metadata`: write the record of
        each image into its file, from which `imvar again` makes it again. Raises `InputError` for latents, and for
        images that are not of this call.
        """
        folder = as_path("folder", folder)
        check_option("format", format, list(FORMATS))
        check_type("overwrite", overwrite, bool)
        check_type("metadata", metadata, bool)
        images = as_pil(self.images)
        records = [self.record_of(image, i, images) for i, image in enumerate(images)]
        paths = []
        for i, (image, record) in enumerate(zip(images, records, strict=True)):
            path = folder / f"{stem_of(record, i)}.{format}"
            write = partial(write_image, image, record=record if metadata else None, format=format)
            if overwrite:
                atomic_write(path, write)
            paths.append(path if overwrite else write_new(path, write))
        return paths

    def record_of(self, image: Image, index: int, images: list[Image]) -> Record | None:
        """Return the record of an image at an index, or at another one if the caller sorted the images."""
        records = self.records
        if records is None:
            return None
        call, row = getattr(image, "imvar_row", (None, index))
        if call == id(self.recorded):
            return records[row]
        record = records[index] if len(images) == len(records) else None
        if record is None or image.size != (record["settings"].get("width"), record["settings"].get("height")):
            expected, hint = "the images of the call", "save others by their own method"
            raise invalid(InputError, "images", expected, "another one", hint)
        return record

    def _repr_html_(self) -> str | None:
        """Return the images side by side with their seeds, for Jupyter; None for latents."""
        try:
            images = as_pil(self.images)
        except InputError:
            return None
        n = len(images)
        seeds = [f"seed {seed}" for seed in self.seeds or []] or [""] * n
        flags = [" (flagged)" if flag else "" for flag in self.nsfw_content_detected or []] or [""] * n
        return figures(images, [(seed + flag).strip() for seed, flag in zip(seeds, flags, strict=False)])


def as_pil(images: Any) -> list[Image]:
    """Return the images of an output as PIL images. Raises `InputError` for latents."""
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3):
        images = images.float().movedim(1, -1).cpu().numpy()  # b c h w -> b h w c
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = numpy_to_pil(images)
    if not isinstance(images, list) or not all(isinstance(image, Image) for image in images):
        expected, hint = "images, of output_type 'pil', 'np' or 'pt'", "make them with output_type='pil'"
        raise invalid(InputError, "save", expected, describe(images), hint)
    return images


def stem_of(record: Record | None, index: int) -> str:
    """Return the name for an image: the stems of its photos and its seed."""
    inputs = record["inputs"] if record else []
    names = [
        Path(entry["name"]).stem for entry in inputs if entry["role"] in ("image", "image_embeds") and entry["name"]
    ]
    seed = record["seed"] if record else None
    return f"{'+'.join(dict.fromkeys(names)) or 'image'}-{index if seed is None else seed}"
