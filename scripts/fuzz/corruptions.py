"""Ways to spoil a file of a checkpoint, by what it means or by its bytes; what is done depends on the seed alone."""

from __future__ import annotations

import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**16,
    2**21,
    10**7,
    2**31 - 1,
    2**31,
    2**62,
    2**63,
    2**64,
    10**400,
    -(2**63),
    0.0,
    0.5,
    -0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    "1",
    "²",
    "silu",
    "None",
    "é" * 1000,
    [],
    [[]],
    [None],
    [1, 2],
    [0],
    [0, 0],
    [-1],
    [1.5],
    ["x"],
    ["x", "y"],
    [10**9] * 4,
    list(range(3000)),
    {},
    {"a": 1},
    {"": None},
    {"shortest_edge": 10**12},
    {"_class_name": 3},
]
KEYS = [
    "_use_default_values",
    "_class_name",
    "given",
    "foreign",
    "marked",
    "",
    "vision_config",
    "sigma_max",
    "sigma_min",
    "trained_betas",
    "weight_map",
    "metadata",
    "__metadata__",
    "state_dict",
    "unet",
    "config",
    "self",
    "\0",
    "\ud800",
    "use_beta_sigmas",
    "use_karras_sigmas",
    "_diffusers_version",
    "safety_checker",
    "time_embedding_dim",
    "sample_size",
]
DTYPES = ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "I128", "", "f32", None]
GLOBALS = [
    b"c" + name.replace(b" ", b"\n") + b"\n"
    for name in (
        b"os system",
        b"builtins eval",
        b"torch Tensor",
        b"builtins bytearray",
        b"torch._utils _rebuild_sparse_tensor",
        b"torch FloatStorage",
        b"torch QInt8Storage",
        b"collections OrderedDict",
        b"torch._utils _rebuild_tensor_v2",
        b"torch._utils _rebuild_tensor_v3",
        b"torch float8_e4m3fn",
        b"torch._utils _rebuild_parameter",
        b"torch Size",
        b"numpy.core.multiarray scalar",
        b"numpy dtype",
        b"_codecs encode",
        b"torch.storage UntypedStorage",
    )
]
INSTRUCTIONS = b"(.012FGIJKLMNPQRSTUVXabcdeghijlopqrstu}])\x85\x86\x87\x88\x8a\x8b"


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
    return rng.choice(
        [
            lambda: content[:at] + rng.randbytes(end - at) + content[end:],
            lambda: content[:at],
            lambda: (
                content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
                if at < len(content)
                else b""
            ),
            lambda: content[:at] + content[end:],
            lambda: content[:at] + bytes(end - at) + content[end:],
            lambda: content[:end] + content[at:],
            lambda: content[:at] + b"\xff" * (end - at) + content[end:],
            lambda: rng.choice(
                [
                    b"",
                    b"<!DOCTYPE html><html></html>",
                    b"\xef\xbb\xbf{}",
                    bytes(100),
                    b"{",
                    b"null",
                    b"PK",
                    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
                    content + b"x",
                    b"[" * 100_000,
                    b'{"a":' * 100_000,
                    b"1" * 100_000,
                    b'{"a": ' + b"1" * 5000 + b"}",
                ]
            ),
        ]
    )()


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
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.15:
        lengths = [0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 100_000_001]
        return (rng.choice(lengths) % 2**64).to_bytes(8, "little") + header + data
    try:
        value = json.loads(header)
        name = rng.choice(sorted(value))
        entry = value[name]
        settings = (value.get("__metadata__") or {}).get("imvar.settings")
        what = rng.randrange(6 if settings is None else 12)
        if what == 0:
            header = spoilt_json(header, rng)
        elif what > 5:
            value["__metadata__"]["imvar.settings"] = spoilt_json(settings.encode(), rng).decode(errors="replace")
        elif what == 1:
            entry["dtype"] = rng.choice(DTYPES)
        elif what == 2:
            entry["shape"] = rng.choice(
                [
                    [],
                    [0],
                    [2**32, 2**32],
                    [-1],
                    [2**62],
                    [1, *entry["shape"]],
                    [1.5],
                    [2**64],
                    entry["shape"][::-1],
                    None,
                ]
            )
        elif what == 3:
            start, end = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(
                [
                    [end, start],
                    [start, end + 4],
                    [start - 4, end],
                    [0, 2**63],
                    [-1, 1],
                    [start],
                    [],
                    [start, end, end],
                    [2**64, 2**64],
                    None,
                    [end, end],
                ]
            )
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
        return program[:at] + rng.choice(GLOBALS) + program[program.find(b"\n", program.find(b"\n", at) + 1) + 1 :]
    if what == 1:
        number = rng.choice([0, 1, 2**31 - 1, -1, -(2**31), 2**30]).to_bytes(4, "little", signed=True)
        at = max(program.find(rng.choice([b"J", b"K", b"M"]), at), 0)
        return program[:at] + b"J" + number + program[at + {75: 2, 77: 3}.get(program[at] if program else 0, 5) :]
    if what == 2:
        return program[:at] + rng.choice(GLOBALS) + program[at:]
    if what == 3:
        return program[:at] + bytes([rng.choice(INSTRUCTIONS)]) + program[at + 1 :]
    return spoilt_bytes(program, rng)
