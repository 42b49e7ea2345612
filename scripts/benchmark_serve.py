"""Measure the server of scripts/serve.py on loopback: throughput and latency, beside calls of the pipeline one by one.

    python scripts/benchmark_serve.py [--clients 1 4 16] [--requests 48] [--batch 4] [--steps 20]

Each client sends a request for one variation, and the next once it has the response. `calls`: the pipeline in a process
without a server, with one row a call, which is what a loop over the same requests takes. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles

import httpx
from benchmark_batch import machine
from prometheus_client.parser import text_string_to_metric_families

from imvar import bundled_examples, load_image
from imvar.batch.environment import load_of_settings
from imvar.batch.settings import Settings

SERVER = Path(__file__).with_name("serve.py")
PACKAGES = ("fastapi", "uvicorn")


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """Run the server, and yield its address."""
    command = [sys.executable, str(SERVER), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+(?=;)", process.stdout.readline())
            if address is None:
                raise SystemExit("benchmark_serve.py: expected a server, got its error above")
            yield address[0]
        finally:
            process.terminate()


def measured(send: Callable[[int], object], requests: int, clients: int) -> list[str]:
    """Return throughput, and percentiles of latency in seconds, of requests by a number of clients at a time."""

    def seconds(number: int) -> float:
        start = time.perf_counter()
        send(number)
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        latencies = list(threads.map(seconds, range(requests)))
    total = time.perf_counter() - start
    cuts = quantiles(latencies, n=100, method="inclusive")
    return [f"{requests / total:.2f}", *(f"{cuts[percent - 1]:.2f}" for percent in (50, 95, 99))]


def fill_of(client: httpx.Client) -> tuple[float, float]:
    """Return the number of calls so far, and the sum of their shares of rows that are not blank."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    values = {sample.name: sample.value for family in families for sample in family.samples}
    return values["imvar_batch_fill_count"], values["imvar_batch_fill_sum"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="imvar-emoji")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=48, help="of all clients together")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="rows of the server's calls")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print(json.dumps(machine() | {name: version(name) for name in PACKAGES}), end="\n\n")
    print("| | images a second | p50, s | p95, s | p99, s | rows that are not blank |\n|---|---:|---:|---:|---:|---:|")

    paths = list(bundled_examples().values())
    uploads = [(path.name, path.read_bytes()) for path in paths]
    photos = [load_image(path) for path in paths]
    settings = Settings.resolved(checkpoint=args.checkpoint, device=args.device, steps=args.steps, n=1, batch=1)
    pipe = load_of_settings(settings)

    def call(number: int) -> None:
        pipe(photos[number % len(photos)], seed=number, **settings.call_options())

    call(0)
    print("| calls |", " | ".join([*measured(call, args.requests, 1), "100 %"]), "|", flush=True)
    for batch in args.batch:
        options = [f"--checkpoint={args.checkpoint}", f"--device={args.device}", f"--batch={batch}", "--queue=1000"]
        with serving(*options) as address, httpx.Client(base_url=address, timeout=None, trust_env=False) as client:

            def send(number: int, client: httpx.Client = client) -> None:
                image, data = uploads[number % len(uploads)], {"seed": str(number), "steps": str(args.steps)}
                client.post("/variations", files={"image": image}, data=data).raise_for_status()

            send(0)
            for clients in args.clients:
                before = fill_of(client)
                figures = measured(send, args.requests, clients)
                calls, fill = (after - before for after, before in zip(fill_of(client), before, strict=True))
                name = f"server, {clients} client{'s' * (clients > 1)}, --batch {batch}"
                print(f"| {name} |", " | ".join([*figures, f"{100 * fill / calls:.0f} %"]), "|", flush=True)


if __name__ == "__main__":
    main()
