"""Spoil tiny checkpoints in a seeded way and load them: each loads whole, or raises CheckpointError, and soon.

    python scripts/fuzz_checkpoints.py [--cases 100000] [--seed 0] [--workers 2] [--case N]

A case spoils one file of one part, by its meaning (settings, headers, indexes, pickles) or by its bytes, or puts
something else in its place. Cases run in child processes, so that one that crashes or hangs is told apart. What fails
is printed with its number, and `--case N` runs that one alone and shows the whole error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import tiny_pipeline
from safetensors.torch import save_file
from torch import nn

import imvar
from imvar import CheckpointError, StableDiffusionImageVariationPipeline
from imvar.weights.reading import read_checkpoint

SECONDS, MEGABYTES, HUNG = 2.0, 200, 20.0  # the most that a case may take; after the last it is killed

LOADERS: dict[str, Any] = {
    "unet": imvar.UNet2DConditionModel, "vae": imvar.AutoencoderKL,
    "image_encoder": imvar.CLIPVisionModelWithProjection, "safety_checker": imvar.StableDiffusionSafetyChecker,
    "scheduler": imvar.PNDMScheduler, "feature_extractor": imvar.CLIPImageProcessor,
}
SMALLER = {"unet": {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "norm_num_groups": 4,
                    "up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1, "cross_attention_dim": 8,
                    "attention_head_dim": 2, "sample_size": 8},
           "vae": {"block_out_channels": (4,), "norm_num_groups": 2, "sample_size": 8}}

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**16, 2**21, 10**7, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**400, -2**63,
    0.0, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), "", "x", "../../x", "/etc/passwd", "\0",
    "\ud800", "1", "²", "silu", "None", "é" * 1000, [], [[]], [None], [1, 2], [0], [0, 0], [-1], [1.5], ["x"],
    ["x", "y"], [10**9] * 4, list(range(3000)), {}, {"a": 1}, {"": None}, {"shortest_edge": 10**12}, {"_class_name": 3},
]
KEYS = ["_use_default_values", "_class_name", "given", "foreign", "marked", "", "vision_config", "sigma_max",
        "sigma_min", "trained_betas", "weight_map", "metadata", "__metadata__", "state_dict", "unet", "config", "self",
        "\0", "\ud800", "use_beta_sigmas", "use_karras_sigmas", "_diffusers_version", "safety_checker",
        "time_embedding_dim", "sample_size"]
DTYPES = ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "I128", "", "f32", None]
GLOBALS = [b"c" + name.replace(b" ", b"\n") + b"\n" for name in (
    b"os system", b"builtins eval", b"torch Tensor", b"builtins bytearray", b"torch._utils _rebuild_sparse_tensor",
    b"torch FloatStorage", b"torch QInt8Storage", b"collections OrderedDict", b"torch._utils _rebuild_tensor_v2",
    b"torch._utils _rebuild_tensor_v3", b"torch float8_e4m3fn", b"torch._utils _rebuild_parameter", b"torch Size",
    b"numpy.core.multiarray scalar", b"numpy dtype", b"_codecs encode", b"torch.storage UntypedStorage")]
INSTRUCTIONS = b"(.012FGIJKLMNPQRSTUVXabcdeghijlopqrstu}])\x85\x86\x87\x88\x8a\x8b"


# What a checkpoint looks like before it is spoilt


def make(folder: Path) -> None:
    """The parts in every layout, `folder/layout/part`, a pipeline, and two original checkpoints."""
    pipe = tiny_pipeline()
    parts = dict(pipe.components) | {name: LOADERS[name](**settings) for name, settings in SMALLER.items()}
    for layout, options in {"safetensors": {}, "bin": {"safe_serialization": False},
                            "sharded": {"max_shard_size": "4KB"}}.items():
        for name, part in parts.items():
            if layout == "safetensors" or isinstance(part, nn.Module):
                part.save_pretrained(folder / layout / name, **options)
    old = folder / "old" / "unet"
    shutil.copytree(folder / "bin" / "unet", old)
    weights = torch.load(old / "diffusion_pytorch_model.bin", weights_only=True)
    torch.save(weights, old / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    StableDiffusionImageVariationPipeline(**parts).save_pretrained(folder / "pipeline")
    (folder / "original").mkdir()
    held = {"epoch": 3, "state_dict": weights, "optimizer_states": [{"state": {0: torch.ones(3)}}], "hparams": None}
    torch.save(held, folder / "original" / "nested.ckpt")
    torch.save(weights, folder / "original" / "flat.pt")
    save_file(weights, folder / "original" / "model.safetensors")


def targets(folder: Path) -> list[list[Path]]:
    """The files to spoil, grouped by part and kind: each group is to be had as often as another."""
    groups = defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        groups[path.parent, path.suffix].append(path)
    return list(groups.values())


# What is done to it


def spoil(file: Path, rng: random.Random) -> str:
    """Put something else in the place of `file`, never writing into it, as it may be mapped; what was done."""
    content = file.read_bytes()
    ways: list[Callable[[bytes, random.Random], bytes]] = [spoilt_bytes]
    if file.suffix == ".json":
        ways += [spoilt_json] * 8
    elif file.suffix == ".safetensors":
        ways += [spoilt_header] * 4
    elif content.startswith(b"PK"):
        ways += [spoilt_zip] * 4
    file.unlink()
    if rng.random() < 0.01:
        return displaced(file, content, rng)
    way = rng.choice(ways)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        content = way(content, rng)
    file.write_bytes(content)
    return way.__name__


def displaced(file: Path, content: bytes, rng: random.Random) -> str:
    """No file, or none that is one, or one elsewhere."""
    what = rng.choice(["nothing", "folder", "pipe", "loop", "out", "device"])
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what != "nothing":
        out = file.parents[2] / "outside"
        out.write_bytes(content)
        file.symlink_to({"loop": file, "out": out, "device": Path("/dev/zero")}[what])
    return what


def spoilt_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, filled, repeated, or another kind of file altogether."""
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice([1, 2, 4, 8, 64, 1000]))
    if rng.random() < 0.3:  # near the start, where the structure is
        at, end = at % 200, at % 200 + rng.choice([1, 4, 8])
    return rng.choice([
        lambda: content[:at] + rng.randbytes(end - at) + content[end:], lambda: content[:at],
        lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:] if at < len(content)
        else b"", lambda: content[:at] + content[end:], lambda: content[:at] + bytes(end - at) + content[end:],
        lambda: content[:end] + content[at:], lambda: content[:at] + b"\xff" * (end - at) + content[end:],
        lambda: rng.choice([b"", b"<!DOCTYPE html><html></html>", b"\xef\xbb\xbf{}", bytes(100), b"{", b"null", b"PK",
                            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", content + b"x",
                            b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"]),
    ])()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys or indexes."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def spoilt_json(content: bytes, rng: random.Random) -> bytes:
    """A value replaced, left out or under another name, or a key that should not be there, or there twice."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return spoilt_bytes(content, rng)
    found = list(places(value))
    hostile = rng.choice(HOSTILE)
    if not found:
        return dumped(hostile)
    holder, key = rng.choice(found)
    what = rng.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = hostile if rng.random() < 0.7 else holder[key]
    elif what == 2 and isinstance(holder, dict):
        return dumped(value).replace(b"{", b"{" + dumped(key) + b": " + dumped(hostile) + b", ", 1)
    elif what == 3:
        other, place = rng.choice(found)
        holder[key] = dict(other) if isinstance(other, dict) else other[place]  # may be longer, never round in a ring
        return dumped(json.loads(content)) if ringed(value) else dumped(value)
    else:
        holder[key] = hostile
    return dumped(value)


def ringed(value: Any) -> bool:
    try:
        json.dumps(value)
    except (ValueError, RecursionError):
        return True
    return False


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def spoilt_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors header with another length, or a tensor with another name, type, shape or place."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8:8 + length], content[8 + length:]
    if rng.random() < 0.15:
        lengths = [0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 100_000_001]
        return (rng.choice(lengths) % 2**64).to_bytes(8, "little") + header + data
    try:
        value = json.loads(header)
        name = rng.choice(sorted(value))
        entry = value[name]
        what = rng.randrange(6)
        if what == 0:
            header = spoilt_json(header, rng)
        elif what == 1:
            entry["dtype"] = rng.choice(DTYPES)
        elif what == 2:
            entry["shape"] = rng.choice([[], [0], [2**32, 2**32], [-1], [2**62], [1, *entry["shape"]], [1.5], [2**64],
                                         entry["shape"][::-1], None])
        elif what == 3:
            start, end = entry["data_offsets"]
            entry["data_offsets"] = rng.choice([[end, start], [start, end + 4], [start - 4, end], [0, 2**63], [-1, 1],
                                                [start], [], [start, end, end], [2**64, 2**64], None, [end, end]])
        elif what == 4:
            value[rng.choice([f"{name}x", "", "__metadata__", "\ud800", *KEYS, *value])] = value.pop(name)
        else:
            value["__metadata__"] = rng.choice(HOSTILE)
        header = dumped(value) if what else header
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        return spoilt_bytes(content, rng)
    return len(header).to_bytes(8, "little") + header + data


def spoilt_zip(content: bytes, rng: random.Random) -> bytes:
    """The zip file of torch.save with a record spoilt, left out, doubled, renamed or compressed."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    except Exception:
        return spoilt_bytes(content, rng)
    which = rng.randrange(len(records)) if rng.random() < 0.4 else 0
    name, held = records[which]
    what, packing = rng.randrange(8), zipfile.ZIP_STORED
    if what == 0:
        del records[which]
    elif what == 1:
        records[which] = (rng.choice(["../x", "/x", name + "x", "data.pkl", "x/constants.pkl"]), held)
    elif what == 2:
        packing = zipfile.ZIP_DEFLATED
    elif what == 3:
        records.append((name, held))
    else:
        records[which] = (name, spoilt_pickle(held, rng))
    out = BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", packing) as archive:
        for name, held in records:
            archive.writestr(name, held)
    return out.getvalue()


def spoilt_pickle(program: bytes, rng: random.Random) -> bytes:
    """Another name asked for, another number, another instruction, or other bytes."""
    what, at = rng.randrange(5), rng.randrange(len(program) + 1)
    if what == 0 and (at := program.find(b"c", at)) >= 0:
        return program[:at] + rng.choice(GLOBALS) + program[program.find(b"\n", program.find(b"\n", at) + 1) + 1:]
    if what == 1:
        number = rng.choice([0, 1, 2**31 - 1, -1, -2**31, 2**30]).to_bytes(4, "little", signed=True)
        at = max(program.find(rng.choice([b"J", b"K", b"M"]), at), 0)
        return program[:at] + b"J" + number + program[at + {75: 2, 77: 3}.get(program[at] if program else 0, 5):]
    if what == 2:
        return program[:at] + rng.choice(GLOBALS) + program[at:]
    if what == 3:
        return program[:at] + bytes([rng.choice(INSTRUCTIONS)]) + program[at + 1:]
    return spoilt_bytes(program, rng)


# A case


def load(file: Path, folder: Path, rng: random.Random) -> None:
    """Load what `file` is a part of, and look at every number of it."""
    layout, part, *_ = file.relative_to(folder).parts
    with warnings.catch_warnings(action="ignore"):
        if layout == "original":
            tensors = read_checkpoint(file)[0]
        elif layout == "pipeline":
            others = {name: None for name in LOADERS if name not in (part, "feature_extractor")
                      and (part in LOADERS or rng.random() < 0.5)}
            pipe = StableDiffusionImageVariationPipeline.from_pretrained(file.parents[part in LOADERS], **others)
            tensors = {key: tensor for module in pipe.modules.values() for key, tensor in module.state_dict().items()}
        else:
            loaded = LOADERS[part].from_pretrained(folder / layout / part)
            tensors = loaded.state_dict() if isinstance(loaded, nn.Module) else {}
    for key, tensor in tensors.items():
        assert tensor.device.type == "cpu", key
        assert tensor.is_floating_point() or layout == "original", key
        float(tensor.double().sum()) if not tensor.is_complex() else None


def run_case(number: int, seed: int, folder: Path, groups: list[list[Path]]) -> tuple[str, str]:
    """Spoil one of these files and load what it belongs to: what came of it, and what was done to which file.

    Anything but "loaded" and "refused" is a fault.
    """
    rng = random.Random(f"{seed} {number}")
    file = rng.choice(rng.choice(groups))
    content, before, start = file.read_bytes(), peak(), time.perf_counter()
    done = f"{file.relative_to(folder)}: {spoil(file, rng)}"
    try:
        load(file, folder, rng)
        outcome = "loaded"
    except CheckpointError as error:
        outcome = "refused" if error.path is not None and len(str(error)) < 5000 else f"BAD MESSAGE {error!s:.300}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"RAISED {type(error).__name__}: {error!s:.300}\n{''.join(traceback.format_tb(error.__traceback__))}"
    finally:
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        file.write_bytes(content)
    if (seconds := time.perf_counter() - start) > SECONDS:
        outcome = f"SLOW {seconds:.1f} s, {outcome}"
    if (grown := peak() - before) > MEGABYTES * 1000:
        outcome = f"LARGE {grown / 1000:.0f} MB, {outcome}"
    return outcome, done


def warm_up(folder: Path) -> None:
    """Load everything unspoilt: what the libraries do only once is no case's fault."""
    for file in (folder / "pipeline" / "model_index.json", folder / "original" / "nested.ckpt",
                 *folder.glob("*/*/config.json")):
        load(file, folder, random.Random(0))


def peak() -> int:
    """The most memory that this process ever had, in kB; the files here are too small to count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Many cases


def work(pipe: Connection, seed: int, folder: Path, numbers: range) -> None:
    """In a child process: say which case begins, then what came of it."""
    torch.set_num_threads(1)
    mine = shutil.copytree(folder / "base", folder / str(os.getpid()))
    groups = targets(mine)
    warm_up(mine)
    for number in numbers:
        pipe.send((number, None))
        pipe.send((number, run_case(number, seed, mine, groups)))
    pipe.send(None)


def run(cases: int, seed: int, workers: int, folder: Path) -> Counter[str]:
    """All cases, shared out among child processes; prints what is wrong, returns how many there were of each."""
    make(folder / "base")
    context, outcomes = multiprocessing.get_context("spawn"), Counter[str]()
    left = [range(first, cases, workers) for first in range(workers)]
    running: dict[Connection, Any] = {}

    def start(numbers: range) -> None:
        ours, theirs = context.Pipe()
        child = context.Process(target=work, args=(theirs, seed, folder, numbers), daemon=True)
        child.start()
        theirs.close()
        running[ours] = [child, numbers, time.monotonic() + 60]

    for numbers in left:
        start(numbers)
    while running:
        for pipe in multiprocessing.connection.wait(list(running), timeout=1):
            child, numbers, _ = running[pipe]  # type: ignore[index]
            try:
                message = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                child.join()
                message = numbers[0], (f"CRASHED with exit code {child.exitcode}", "")
                del running[pipe]  # type: ignore[arg-type]
                start(numbers[1:])
            if message is None:
                del running[pipe]  # type: ignore[arg-type]
            elif message[1] is None:
                running[pipe][1:] = numbers[numbers.index(message[0]):], time.monotonic()  # type: ignore[index]
            else:
                number, (outcome, done) = message
                outcomes[outcome.split()[0]] += 1
                if outcome not in ("loaded", "refused"):
                    print(f"case {number}: {done}: {outcome}", flush=True)
                if sum(outcomes.values()) % 10_000 == 0:
                    print(f"{sum(outcomes.values())} of {cases}", flush=True)
        for child, _, since in list(running.values()):
            if time.monotonic() - since > HUNG:
                child.kill()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int, help="run this one alone")
    args = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="imvar-fuzz-", dir=memory) as name:
        if args.case is not None:
            make(Path(name))
            print(*run_case(args.case, args.seed, Path(name), targets(Path(name))), sep="\n")
            return
        start = time.monotonic()
        outcomes = run(args.cases, args.seed, args.workers, Path(name))
    print(f"{args.cases} cases in {time.monotonic() - start:.0f} s: {dict(outcomes)}")
    if set(outcomes) - {"loaded", "refused"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
