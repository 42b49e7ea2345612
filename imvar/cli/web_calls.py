"""The calls of the pipeline that the page of `imvar web` makes, one at a time, with progress while they run."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from PIL import Image, ImageChops

from ..embeddings import mix
from ..errors import ImvarError, InputError, invalid, short_repr
from ..image.load_image import load_image
from ..loading import set_scheduler
from ..noise import MAX_SEED
from ..pipeline.regions import Region
from ..records.files import read_record, save_image
from .web_again import carried_arguments, comparison

OWN_SCHEDULER = "as trained"
MAX_NEW_SEED = 10**6  # short enough to be read and typed


@dataclass
class Progress:
    """Steps done, of how many, the seconds left, and a small preview of each image."""

    step: int
    steps: int
    seconds_left: float
    previews: list[Image.Image]


@dataclass
class Made:
    """The files of a call, with a caption for each image; the mask, if there is one, is the last file."""

    paths: list[Path]
    captions: list[str]
    seeds: list[int]
    remark: str


class Calls:
    """The calls of a pipeline. Each saves its images in a new folder within `folder`."""

    def __init__(self, pipe: Any, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.scheduler = pipe.scheduler
        self.session: str | None = None  # of the page whose call is running; None also where it was closed
        pipe.set_progress_bar_config(disable=True)

    def make(self, form: SimpleNamespace, session: str | None) -> Iterator[Progress | Made]:
        """Make the images of a form: yield progress after each step, and at last the images."""
        arguments = self.arguments(form)
        reports: SimpleQueue[Progress | None] = SimpleQueue()
        start = time.monotonic()

        def report(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if self.session is None:
                raise invalid(ImvarError, "page", "an open page", "a closed one")  # the call ends without decoding
            left = (time.monotonic() - start) / (i + 1) * (pipe.num_timesteps - i - 1)
            previews = pipe.preview(tensors["pred_original_sample"])
            reports.put(Progress(i + 1, pipe.num_timesteps, left, previews))
            return {}

        watch = {"callback_on_step_end": report, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
        yield (last := Progress(0, 1, 0, []))
        self.session = session or ""
        with ThreadPoolExecutor(1) as thread:
            try:
                call = thread.submit(self.pipe, **arguments, **watch)
                call.add_done_callback(lambda _: reports.put(None))
                while (progress := reports.get()) is not None:
                    yield (last := progress)
            finally:
                self.session = None
        yield self.saved(form, arguments, call.result(), stopped=last.step < last.steps)

    def saved(self, form: SimpleNamespace, arguments: dict[str, Any], made: Any, stopped: bool) -> Made:
        """Save the images with their records, which are of a call without the function that reports progress."""
        records = made.records if stopped else self.pipe.records(**arguments)
        flags = made.nsfw_content_detected or [None] * len(records)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        result = Made([], [], arguments["seed"], "Stopped early." if stopped else "")
        for image, record, flag in zip(made.images, records, flags, strict=True):
            path = folder / f"{Path(form.image).stem}-{record['seed']}.png"
            save_image(image, path, record | {"flagged": flag})
            result.paths.append(path)
            result.captions.append(f"seed {record['seed']}{', flagged' if flag else ''}")
        if "mask_image" in arguments:
            arguments["mask_image"].save(path := folder / "mask.png")
            result.paths.append(path)
        if form.again:
            result.remark = comparison(Path(form.again).name, read_record(form.again), records)
        return result

    def stop(self, session: str | None) -> None:
        """End the call of this session after its current step."""
        if (session or "") == self.session:
            self.pipe.interrupt()

    def close(self) -> None:
        """End the running call at its next step, without images."""
        self.session = None

    def arguments(self, form: SimpleNamespace) -> dict[str, Any]:
        """Return the arguments of the call, and set the scheduler."""
        if not form.image:
            raise invalid(InputError, "Image", "an image to vary", "none")
        self.pipe.scheduler = self.scheduler
        if form.scheduler != OWN_SCHEDULER:
            set_scheduler(self.pipe, form.scheduler)
        arguments: dict[str, Any] = {
            "num_inference_steps": int(form.steps),
            "guidance_scale": float(form.guidance),
            "num_images_per_prompt": int(form.count),
            "seed": seeds_of(form.locked, int(form.count)),
        }
        if form.again:
            arguments |= carried_arguments(read_record(form.again))
        if form.second:
            first, second = self.encode_file(form.image), self.encode_file(form.second)
            if area := painted(form.region):
                arguments["image_embeds"] = [Region(first), Region(second, area, form.share)]
            else:
                arguments["image_embeds"] = mix([(first, 1 - form.share), (second, form.share)])
        else:
            arguments["image"] = load_image(form.image)
        if form.negative:
            arguments["negative_image_embeds"] = self.encode_file(form.negative)
        if form.start:
            arguments |= {"init_image": load_image(form.start), "strength": form.strength}
            if area := painted(form.mask):
                arguments |= {"mask_image": area, "paste": True}
        return arguments

    def encode_file(self, path: str) -> Any:
        """Return the embedding of the image in a file."""
        return self.pipe.encode_image(load_image(path))


def seeds_of(locked: list[str], count: int) -> list[int]:
    """Return a seed for each image: the locked ones, then new ones."""
    for seed in locked:
        if not str(seed).isdecimal() or int(seed) > MAX_SEED:
            raise invalid(InputError, "Locked seeds", f"integers from 0 to {MAX_SEED}", short_repr(seed))
    seeds = list(dict.fromkeys(map(int, locked)))[:count]
    new = random.sample(range(MAX_NEW_SEED), count + len(seeds))
    return seeds + [seed for seed in new if seed not in seeds][: count - len(seeds)]


def painted(editor: dict[str, Any] | None) -> Image.Image | None:
    """Return what was painted in an image editor as a mask, white on black, or None without any."""
    area: Image.Image | None = None
    for layer in (editor or {}).get("layers") or ():
        alpha = layer.getchannel("A").point(lambda a: 255 * (a > 127))
        area = alpha if area is None else ImageChops.lighter(area, alpha)
    return area if area and area.getbbox() else None
