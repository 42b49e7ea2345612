"""Serve variations of images over HTTP, with dynamic batching: requests of equal settings share calls of the pipeline.

    pip install '.[serve]'
    python scripts/serve.py --checkpoint imvar-emoji
    curl -F image=@drawing.png -F seed=7 -o variation.png http://127.0.0.1:8000/variations

Every call has exactly `--batch` rows, as in `imvar batch`. So the image of a photo and a seed has the same bytes in any
call, which are those that `imvar batch run --seeds same` writes with the same `--batch`. docs/serving.md has the
options.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import io
import logging
import os
import secrets
import signal
import socket
import sys
import traceback
import warnings
import zipfile
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin fight other processes

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from serve_queue import Job, Queue
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException  # that of fastapi is a subclass
from starlette.requests import ClientDisconnect

from imvar import load_image
from imvar.batch.conditions import named_file
from imvar.batch.environment import load_of_settings
from imvar.batch.settings import Settings
from imvar.batch.write import stem_of_id
from imvar.choices import CHECKPOINT, FLAG_NOTES, SCHEDULERS
from imvar.cli.argument_types import float_arg, int_arg, port_arg, seed_arg, size_arg
from imvar.cli.command_parser import CommandParser, add_model_options
from imvar.cli.web import address_of, listen
from imvar.errors import ImvarError, InputError, short_repr
from imvar.malloc import keep_freed_memory

MAX_STEPS, MAX_GUIDANCE = 200, 100
MAX_NEW_SEED = 10**6  # short enough to be read and typed
MAX_NAME = 255  # characters
MAX_CONNECTIONS = 256
SECONDS_TO_UPLOAD = 30
DECODERS = 2  # threads
CLIENT_GONE = 499  # nginx's status, in metrics alone


class LimitedRequest(Request):
    """A request whose body has a limit in bytes."""

    limit = 0

    async def stream(self) -> AsyncGenerator[bytes, None]:
        size, declared = 0, int(self.headers.get("content-length", 0))
        async for chunk in super().stream():
            size += len(chunk)
            if max(size, declared) <= self.limit:
                yield chunk
            elif size > 4 * self.limit:
                break  # up to there it is read, as most clients send everything before they read
        if (size := max(size, declared)) > self.limit:
            raise HTTPException(413, f"upload: expected at most {self.limit} bytes, got {size}")


class Service:
    """The answers to requests."""

    def __init__(self, args: argparse.Namespace, settings: Settings, queue: Queue):
        self.settings, self.queue, self.limit = settings, queue, args.max_upload * 2**20
        self.parsers: dict[str, Callable[[str], Any]] = {
            "n": partial(int_arg, high=args.max_n),
            "steps": partial(int_arg, high=MAX_STEPS),
            "guidance": partial(float_arg, low=0, high=MAX_GUIDANCE),
            "seed": seed_arg,
            "size": partial(side_arg, high=args.max_side),
        }
        self.decoding = asyncio.Semaphore(DECODERS)

    async def variations(self, request: Request) -> Response:
        """Answer a request for variations, and count it by its status."""
        try:
            response = await self.make_variations(request)
        except HTTPException as error:
            response = error_response(error.status_code, error.detail, error.headers)
        except InputError as error:
            response = error_response(400, str(error))
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        except Exception as error:
            traceback.print_exception(error)
            response = error_response(500, str(error) if isinstance(error, ImvarError) else "server: internal error")
        self.queue.metrics.requests.labels(response.status_code).inc()
        return response

    async def make_variations(self, request: Request) -> Response:
        job = await self.read_job(request)
        self.queue.add(job)
        gone = asyncio.create_task(wait_for_end(request))
        await asyncio.wait([job.done, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not job.done.done():
            self.queue.remove(job)
            job.done.cancel()
            raise ClientDisconnect
        job.done.result()  # which raises its error
        flags = [{None: "unknown", True: "true", False: "false"}[job.flags[k]] for k in range(len(job.seeds))]
        headers = {"imvar-seeds": ",".join(map(str, job.seeds)), "imvar-flagged": ",".join(flags)}
        if len(job.files) == 1:
            return Response(job.files[0], media_type="image/png", headers=headers)
        return Response(await asyncio.to_thread(zip_of, job), media_type="application/zip", headers=headers)

    async def read_job(self, request: Request) -> Job:
        """Read the form of a request. Raises `HTTPException` and `InputError` for anything that it should not have."""
        form = await self.read_form(request)
        try:
            settings = self.read_settings(form)
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "image: expected a file in multipart/form-data, got none")
            self.queue.check_room()
            name = (file.filename or "image")[-MAX_NAME:]
            async with self.decoding:
                data = await file.read()
                photo = await asyncio.to_thread(load_image, named_file(data, name))
        finally:
            await form.close()
        return Job(stem_of_id(name), photo, settings)

    async def read_form(self, request: Request) -> FormData:
        """Return the form of a request, within limits of size and time."""
        upload = LimitedRequest(request.scope, request.receive)
        upload.limit = self.limit
        try:
            async with asyncio.timeout(SECONDS_TO_UPLOAD):
                return await upload.form(max_files=1, max_fields=len(self.parsers))
        except TimeoutError as error:
            raise HTTPException(408, f"upload: expected one within {SECONDS_TO_UPLOAD} s, got a slower one") from error
        except HTTPException as error:
            if error.status_code != 400:
                raise
            raise HTTPException(400, f"form: expected multipart/form-data of one file, got {error.detail!r}") from error

    def read_settings(self, form: FormData) -> Settings:
        """Return the settings in a form; a seed that is not given is a new one."""
        options: dict[str, Any] = {"seed": secrets.randbelow(MAX_NEW_SEED)}
        for name, value in form.multi_items():
            if name not in (*self.parsers, "image"):
                expected = f"fields among image, {', '.join(self.parsers)}"
                raise HTTPException(400, f"form: expected {expected}, got {short_repr(name)}")
            if len(form.getlist(name)) > 1:
                raise HTTPException(400, f"{name}: expected one value, got {len(form.getlist(name))}")
            if name == "image":
                continue
            if not isinstance(value, str):
                raise HTTPException(400, f"{name}: expected text, got a file")
            try:
                options[name] = self.parsers[name](value)
            except argparse.ArgumentTypeError as error:
                raise HTTPException(400, f"{name}: {error}") from error
        if "size" in options:
            options["height"], options["width"] = options.pop("size")
        return dataclasses.replace(self.settings, **options)

    async def health(self, _: Request) -> Response:
        ready = not self.queue.is_stopping
        content = {"model": self.settings.checkpoint, "ready": ready, "batch": self.queue.batch}
        return JSONResponse(content, 200 if ready else 503)

    async def show_metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.queue.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def app(self) -> FastAPI:
        """Return the application, during whose life the queue runs."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
            task = asyncio.create_task(self.queue.run())
            yield
            task.cancel()

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_route("/variations", self.variations, methods=["POST"])
        app.add_route("/health", self.health)
        app.add_route("/metrics", self.show_metrics)
        return app


def side_arg(text: str, high: int) -> tuple[int, int]:
    """Parse height and width as `size_arg` does, up to a limit."""
    if max(size := size_arg(text)) > high:
        raise argparse.ArgumentTypeError(f"expected sides up to {high}, got {short_repr(text)}")
    return size


def error_response(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, headers)


async def wait_for_end(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def zip_of(job: Job) -> bytes:
    """Return a zip file of the variations, named as `imvar vary` names them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, as PNG is compressed
        for k, seed in enumerate(job.seeds):
            archive.writestr(zipfile.ZipInfo(f"{job.stem}-{seed}.png"), job.files[k])
    return buffer.getvalue()


class StoppableServer(uvicorn.Server):
    """A server that refuses the waiting requests when it stops, and finishes those that have begun."""

    queue: Queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.stop()
        await super().shutdown(sockets)


def command_line() -> CommandParser:
    parser = CommandParser(prog="serve.py", description=(__doc__ or "").partition("\n")[0], usage="serve.py [options]")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", metavar="H", help="where to listen (default: 127.0.0.1, this machine alone)")
    add("--port", type=port_arg, default=8000, metavar="P", help="0 for a free one, which is printed (default: 8000)")
    add("--batch", type=int_arg, default=4, metavar="N", help="rows of each call; it changes bytes (default: 4)")
    add("--wait", type=int_arg, default=20, metavar="MS", help="milliseconds to wait for more rows (default: 20)")
    add("--queue", type=int_arg, default=64, metavar="N", help="requests that may wait (default: 64)")
    add("--max-n", type=int_arg, default=16, metavar="N", help="variations of a request (default: 16)")
    add("--max-side", type=int_arg, default=768, metavar="PX", help="height and width (default: 768)")
    add("--max-upload", type=int_arg, default=16, metavar="MB", help="size of a request (default: 16)")
    add("--max-pixels", type=int_arg, default=32, metavar="MP", help="megapixels of an upload (default: 32)")
    add = add_model_options(parser, CHECKPOINT)
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help=f"{', '.join(SCHEDULERS)}")
    add("--threads", type=int_arg, metavar="N", help="of PyTorch; it changes bytes (default: all cores)")
    add("--on-flagged", choices=FLAG_NOTES, default="black", metavar="HOW", help="black, blur or keep (default: black)")
    return parser


def serve(args: argparse.Namespace) -> None:
    """Load the pipeline, print the address, and serve until SIGTERM or Ctrl-C."""
    keep_freed_memory()
    Image.MAX_IMAGE_PIXELS = args.max_pixels * 10**6 // 2  # load_image refuses twice as many
    listener = listen(args.host, args.port)
    names = "checkpoint", "revision", "device", "dtype", "scheduler", "threads", "on_flagged", "batch"
    settings = Settings.resolved(n=1, seeds="same", **{name: getattr(args, name) for name in names})
    with ThreadPoolExecutor(1, "pipeline") as worker:
        pipe = worker.submit(load_of_settings, settings).result()  # there, as PyTorch counts threads by thread
        worker.submit(pipe.records, Image.new("RGB", (8, 8)), seed=0).result()  # computes the digest of the weights
        queue = Queue(pipe, worker, args.batch, args.queue, args.wait / 1000)
        config = uvicorn.Config(
            Service(args, settings, queue).app(),
            log_level="error",
            access_log=False,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
        )
        server = StoppableServer(config)
        server.queue = queue
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again once it has stopped
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each bad form
        warnings.simplefilter("ignore")  # those about uploads, which Python would remember, each for ever
        print(f"imvar: serving at {address_of(listener)}; Ctrl-C ends it", flush=True)
        server.run([listener])


def main() -> int:
    args = command_line().parse_args()
    try:
        serve(args)
    except KeyboardInterrupt:
        return 130
    except (ImvarError, OSError) as error:
        print(f"imvar: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
