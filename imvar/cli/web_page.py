"""The page of `imvar web` in Gradio: its controls, their layout, and what happens when they are used."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from gradio.themes import Soft
from PIL import Image

from ..choices import SCHEDULERS
from ..errors import ImvarError
from ..records.files import read_record
from .web_again import control_values, needed_images
from .web_calls import OWN_SCHEDULER, Calls, Progress

FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # of the machine, so that none is fetched
THEME = Soft(primary_hue="orange", neutral_hue="stone", font=FONTS, font_mono=["ui-monospace", "monospace"]).set(
    block_title_text_color="*body_text_color",
    block_title_background_fill="none",
    block_title_padding="0",
    block_label_text_color="*body_text_color",
    block_label_background_fill="*background_fill_primary",
)
CSS = """
.gradio-container {max-width: 1120px !important; margin: auto !important}
.previews {display: grid; grid-template-columns: 1fr 1fr; gap: 8px}
.previews img {width: 100%; margin: 0; border-radius: 8px}
.bar {height: 8px; margin: 14px 0 6px; border-radius: 4px; background: var(--border-color-primary)}
.bar div {height: 100%; border-radius: 4px; background: var(--color-accent); transition: width .2s}
#gallery .grid-wrap {max-height: none}
@media (min-width: 800px) {#result {position: sticky; top: 16px; align-self: flex-start}}
#examples > .gallery {display: grid; grid-template-columns: repeat(6, 1fr); gap: 6px}
#examples .container {width: 100%; height: auto; aspect-ratio: 1}
"""
MAX_COUNT = 8
WELCOME = "Drop an image on the left, then press <b>Make variations</b>."


class Page:
    """The page and its handlers.

    Attributes: `blocks`, for Gradio; `controls`, whose values make a form, by name; `note`, about a dropped image of
    imvar; `shown`, the outputs of a call.
    """

    def __init__(self, calls: Calls, note: str, steps: int, examples: Sequence[Path]):
        self.calls = calls
        c: dict[str, Any] = {}
        self.controls = c
        with gr.Blocks(title="imvar", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            gr.Markdown(f"# Variations of an image\n{note}")
            with gr.Row():
                with gr.Column(scale=4, min_width=320):
                    c["image"] = image_file("Image", 260, "image")
                    if examples:
                        gr.Examples(
                            [[path] for path in examples],
                            [c["image"]],
                            label="Or try a drawing",
                            examples_per_page=12,
                            elem_id="examples",
                        )
                    c["count"] = gr.Slider(1, MAX_COUNT, 4, step=1, label="Number of images")
                    with gr.Row():
                        make = gr.Button("Make variations", variant="primary", scale=3)
                        stop = gr.Button("Stop", min_width=80)
                    with gr.Accordion("Settings", open=False):
                        c["guidance"] = gr.Slider(
                            1, 15, 3, step=0.1, label="Guidance", info="Higher is closer to the image"
                        )
                        c["steps"] = gr.Slider(1, 100, steps, step=1, label="Steps")
                        c["locked"] = gr.Dropdown(
                            [],
                            multiselect=True,
                            allow_custom_value=True,
                            label="Locked seeds",
                            info="They make the first images again; the others get new seeds",
                        )
                        c["scheduler"] = gr.Dropdown([OWN_SCHEDULER, *SCHEDULERS], label="Scheduler")
                    with gr.Accordion("Mix in a second image", open=False):
                        c["second"] = image_file("Second image", 200, "second")
                        info = "Everywhere, or only where you paint"
                        c["share"] = gr.Slider(0, 1, 0.5, step=0.01, label="Share of the second image", info=info)
                        c["region"] = paint_box("region")
                    with gr.Accordion("Start from an image", open=False):
                        c["start"] = image_file("Start image", 200, "start")
                        info = "How much of it changes: all of it, or only where you paint"
                        c["strength"] = gr.Slider(0, 1, 0.8, step=0.01, label="Strength", info=info)
                        c["mask"] = paint_box("mask")
                    with gr.Accordion("Lead away from an image", open=False):
                        c["negative"] = image_file("Negative image", 200, "negative")
                    with gr.Accordion("Make an image again", open=False):
                        label = "An image of imvar, for its settings"
                        c["again"] = gr.File(label=label, type="filepath", height=120, elem_id="again")
                        self.note = gr.HTML()
                with gr.Column(scale=6, min_width=320, elem_id="result"):
                    status = gr.HTML(WELCOME, elem_id="status")
                    gallery = gr.Gallery(
                        label="Variations",
                        visible=False,
                        elem_id="gallery",
                        columns=2,
                        height="auto",
                        buttons=["download", "fullscreen"],
                    )
                    download = gr.DownloadButton("Download", visible=False)
            self.shown = [status, gallery, download, c["locked"]]
            make.click(
                self.make_variations,
                set(c.values()),
                self.shown,
                concurrency_limit=1,
                show_progress="hidden",
                scroll_to_output=True,
            )
            stop.click(self.stop_variations, queue=False)
            at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
            c["again"].change(self.fill_in, c["again"], [self.note, *c.values()], **at_once)
            c["second"].change(self.paint_blank, c["second"], c["region"], **at_once)
            c["start"].change(self.paint_over, c["start"], c["mask"], **at_once)

    def make_variations(self, values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Make the images, and show progress, then them."""
        status, gallery, download, locked = self.shown
        form = SimpleNamespace(**{name: values[control] for name, control in self.controls.items()})
        hidden = {gallery: gr.update(visible=False), download: gr.update(visible=False)}
        with errors_shown(self.calls.folder):
            for event in self.calls.make(form, request.session_hash):
                if isinstance(event, Progress):
                    yield {status: progress_html(event)} | hidden
                else:
                    images = list(zip(map(str, event.paths), event.captions, strict=False))  # without the mask
                    yield {
                        status: escape(event.remark),
                        gallery: gr.update(value=images, visible=True, selected_index=None),
                        download: gr.update(value=one_file(event.paths), visible=True),
                        locked: gr.update(choices=[*map(str, event.seeds)]),
                    }

    def stop_variations(self, request: gr.Request) -> None:
        """End the call of this page after its current step."""
        self.calls.stop(request.session_hash)

    def fill_in(self, path: str | None) -> dict[Any, Any]:
        """Set the controls as the record of a dropped image has them, and say what else it needs."""
        if not path:
            return {self.note: ""}
        with errors_shown(self.calls.folder):
            record = read_record(path)
        values = control_values(record, MAX_COUNT)
        text = f"The settings are filled in. It was made from: {needed_images(record)}."
        return {self.note: escape(text)} | {self.controls[name]: value for name, value in values.items()}

    def paint_over(self, path: str | None) -> Any:
        """Return the editor with an image to paint on, hidden without one."""
        return gr.update(visible=bool(path), value=path and {"background": path, "layers": [], "composite": None})

    def paint_blank(self, path: str | None) -> Any:
        """Return the editor with a blank image to paint on, hidden if no second image was dropped."""
        blank = self.calls.folder / "blank.png"
        Image.new("RGB", (256, 256), "white").save(blank)
        return self.paint_over(path and str(blank))


def paint_box(elem_id: str) -> gr.ImageEditor:
    """Return a hidden editor to paint an area in."""
    return gr.ImageEditor(
        visible=False,
        show_label=False,
        elem_id=elem_id,
        type="pil",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=32, colors=["#e8590c"], color_mode="fixed"),
    )


def image_file(label: str, height: int, elem_id: str) -> gr.Image:
    """Return a place to drop an image, whose file is handed over as it is."""
    place = gr.Image(label=label, height=height, elem_id=elem_id, type="filepath", sources=["upload", "clipboard"])
    place.preprocess = lambda payload: payload and payload.path  # in place of Gradio's own reader
    return place


def progress_html(progress: Progress) -> str:
    """Return the previews and a bar below them."""
    images = "".join(f'<img src="{data_url(preview)}" alt="Preview">' for preview in progress.previews)
    text = f"Step {progress.step} of {progress.steps}, {progress.seconds_left:.0f} s left" if images else "Starting"
    bar = f'<div class="bar"><div style="width: {100 * progress.step / progress.steps:.0f}%"></div></div>'
    return f'<div class="previews">{images}</div>{bar}{text}'


def data_url(image: Image.Image) -> str:
    """Return an image as an address that contains it."""
    image.save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def one_file(paths: list[Path]) -> str:
    """Return the path of the only file, or of a ZIP file with all."""
    if len(paths) == 1:
        return str(paths[0])
    archive = paths[0].parent / "variations.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in paths:
            file.write(path, path.name)
    return str(archive)


@contextmanager
def errors_shown(folder: Path) -> Iterator[None]:
    """Show errors on the page, with the names of uploaded files in place of their paths."""
    try:
        yield
    except (ImvarError, OSError) as error:
        words = [word.rpartition("/")[2] if word.startswith(str(folder)) else word for word in str(error).split(" ")]
        raise gr.Error(" ".join(words), duration=None, print_exception=False) from error
