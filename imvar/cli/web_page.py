"""The page of `imvar web` in Gradio: its controls, their layout, and what happens when they are used."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from gradio.themes import Soft
from PIL import Image

from ..errors import ImvarError
from .choices import SCHEDULERS
from .web_calls import OWN_SCHEDULER, Calls, Made, Progress

FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # of the machine, so that none is fetched
THEME = Soft(primary_hue="orange", neutral_hue="stone", font=FONTS, font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container {max-width: 1120px !important; margin: auto !important}
.previews {display: grid; grid-template-columns: 1fr 1fr; gap: 8px}
.previews img {width: 100%; margin: 0; border-radius: 8px}
.bar {height: 8px; margin: 14px 0 6px; border-radius: 4px; background: var(--border-color-primary)}
.bar div {height: 100%; border-radius: 4px; background: var(--color-accent); transition: width .2s}
#examples > .gallery {display: grid; grid-template-columns: repeat(6, 1fr); gap: 6px}
#examples .container {width: 100%; height: auto; aspect-ratio: 1}
"""
WELCOME = "Drop an image on the left, then press <b>Make variations</b>."


class Page:
    """The page and its handlers.

    Attributes: `blocks`, for Gradio; `controls`, whose values make a form, by name; `shown`, the outputs of a call.
    """

    def __init__(self, calls: Calls, note: str, steps: int, examples: Sequence[Path]):
        self.calls = calls
        c: dict[str, Any] = {}
        self.controls = c
        upload: dict[str, Any] = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
        brush = gr.Brush(default_size=32, colors=["#e8590c"], color_mode="fixed")
        editor: dict[str, Any] = {"type": "pil", "brush": brush, "layers": False, "transforms": (), "sources": ()}
        with gr.Blocks(title="imvar", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            gr.Markdown(f"# Variations of an image\n{note}")
            with gr.Row():
                with gr.Column(scale=4, min_width=320):
                    c["image"] = gr.Image(label="Image", height=260, elem_id="image", **upload)
                    if examples:
                        gr.Examples(
                            [[path] for path in examples],
                            [c["image"]],
                            label="Or try a drawing",
                            examples_per_page=12,
                            elem_id="examples",
                        )
                    c["count"] = gr.Slider(1, 8, 4, step=1, label="Number of images")
                    with gr.Row():
                        make = gr.Button("Make variations", variant="primary", scale=3)
                        stop = gr.Button("Stop", min_width=80)
                    with gr.Accordion("Settings", open=False):
                        c["guidance"] = gr.Slider(1, 15, 3, step=0.5, label="Guidance: how close to the image")
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
                        c["second"] = gr.Image(label="Second image", height=200, elem_id="second", **upload)
                        c["share"] = gr.Slider(0, 1, 0.5, step=0.05, label="Share of the second image")
                        label = "Only where you paint (optional)"
                        c["region"] = gr.ImageEditor(label=label, canvas_size=(256, 256), fixed_canvas=True, **editor)
                    with gr.Accordion("Start from an image", open=False):
                        c["start"] = gr.Image(label="Start image", height=200, elem_id="start", **upload)
                        c["strength"] = gr.Slider(0, 1, 0.8, step=0.05, label="Strength: how much of it changes")
                        label = "Paint over the part to repaint (optional)"
                        c["mask"] = gr.ImageEditor(label=label, visible=False, **editor)
                    with gr.Accordion("Lead away from an image", open=False):
                        c["negative"] = gr.Image(label="Negative image", height=200, elem_id="negative", **upload)
                with gr.Column(scale=6, min_width=320):
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
            c["start"].change(self.paint_over, c["start"], c["mask"], show_progress="hidden")

    def make_variations(self, values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Make the images, and show progress, then them."""
        status, gallery, download, locked = self.shown
        form = SimpleNamespace(**{name: values[control] for name, control in self.controls.items()})
        with errors_shown(self.calls.folder):
            yield {status: "Starting…", gallery: gr.update(visible=False), download: gr.update(visible=False)}
            for event in self.calls.make(form, request.session_hash):
                if isinstance(event, Progress):
                    yield {status: progress_html(event)}
                else:
                    images = list(zip(map(str, event.paths), captions(event), strict=True))
                    yield {
                        status: "Stopped early." if event.stopped else "",
                        gallery: gr.update(value=images, visible=True, selected_index=None),
                        download: gr.update(value=one_file(event.paths), visible=True),
                        locked: gr.update(choices=[*map(str, event.seeds)]),
                    }

    def stop_variations(self, request: gr.Request) -> None:
        """End the call of this page after its current step."""
        self.calls.stop(request.session_hash)

    def paint_over(self, path: str | None) -> Any:
        """Return the editor with the start image to paint on, hidden without one."""
        return gr.update(visible=bool(path), value=path and {"background": path, "layers": [], "composite": None})


def captions(made: Made) -> list[str]:
    """Return a caption for each image."""
    return [f"seed {seed}" + ", flagged" * flag for seed, flag in zip(made.seeds, made.flagged, strict=True)]


def progress_html(progress: Progress) -> str:
    """Return the previews and a bar below them."""
    images = "".join(f'<img src="{data_url(preview)}" alt="Preview">' for preview in progress.previews)
    text = f"Step {progress.step} of {progress.steps}, {progress.seconds_left:.0f} s left"
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
