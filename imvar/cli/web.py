"""`imvar web`: serve the page until it is stopped, from a temporary folder of its own."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from ..choices import CHECKPOINT, EMOJI, EMOJI_STEPS, STEPS
from ..errors import ImvarError, InputError, first_line, invalid
from ..loading import is_emoji, load_pipeline, pick_device, pick_dtype, prefer_one_thread
from ..weights.bundled import bundled_examples

MAX_UPLOAD = "50mb"
SECONDS_TO_END = 2  # for open connections
EMOJI_NOTE = (
    f"{EMOJI} is small and was trained on drawings in the style of emoji, not on photos. For photos use "
    f"`imvar web --checkpoint {CHECKPOINT}`, a download of 6 GB."
)


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="imvar-web-") as folder:
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads, and for the files shown
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        serve(args, Path(folder))


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Load the pipeline, print the address and serve the page."""
    try:
        import fastapi
        import gradio
        import uvicorn
    except ImportError as error:
        hint = "pip install 'imvar[web]', in a checkout pip install '.[web]'"
        expected, got = "the packages fastapi, gradio and uvicorn", first_line(error)
        raise invalid(ImvarError, "web", expected, f"the error {got!r}", hint) from error
    from .web_calls import Calls
    from .web_page import CSS, THEME, Page

    listener = listen(args.host, args.port)
    emoji = is_emoji(args.checkpoint)
    if emoji:
        prefer_one_thread()
    device = pick_device(args.device)
    dtype = pick_dtype("float32" if emoji and args.dtype == "auto" else args.dtype, device)
    calls = Calls(load_pipeline(args.checkpoint, args.revision, None, dtype).to(device), folder)
    note, examples = (EMOJI_NOTE, list(bundled_examples(EMOJI).values())) if emoji else (args.checkpoint, [])
    page = Page(calls, note, EMOJI_STEPS if emoji else STEPS, examples)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(),
        page.blocks,
        "/",
        max_file_size=MAX_UPLOAD,
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=SECONDS_TO_END))
    print(f"imvar: the page is at {address_of(listener)}; Ctrl-C ends it", flush=True)
    try:
        server.run([listener])
    finally:
        calls.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        hint = "pass --port 0 for a free one" if port else ""
        raise invalid(InputError, "--port", "a free port", f"{host}:{port} ({error.strerror})", hint) from error


def address_of(listener: socket.socket) -> str:
    """Return the address of the page."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
