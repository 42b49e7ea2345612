"""Corruptions of checkpoint files, by their structure or by their bytes; each depends only on the seed."""

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

HOSTILE_VALUES: list[Any] = [
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
HOSTILE_KEYS = [
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
HOSTILE_DTYPES = [
    "F32",
    "F16",
    "BF16",
    "F64",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "C64",
    "I128",
    "",
    "f32",
    None,
]
PICKLE_GLOBALS = [
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
PICKLE_OPCODES = b"(.012FGIJKLMNPQRSTUVXabcdeghijlopqrstu}])\x85\x86\x87\x88\x8a\x8b"


def corrupt(file: Path, rng: random.Random) -> str:
    """Replace `file` by a corrupted one and return what was done; never write into it, as it may be memory-mapped."""
    content = file.read_bytes()
    methods: list[Callable[[bytes, random.Random], bytes]] = [corrupt_bytes]
    if file.suffix == ".json":
        methods += [corrupt_json] * 8
    elif file.suffix == ".safetensors":
        methods += [corrupt_safetensors] * 4
    elif content.startswith(b"PK"):
        methods += [corrupt_zip] * 4
    file.unlink()
    if rng.random() < 0.01:
        return replace_file(file, content, rng)
    method = rng.choice(methods)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        content = method(content, rng)
    file.write_bytes(content)
    return method.__name__


def replace_file(file: Path, content: bytes, rng: random.Random) -> str:
    """Remove the file, or put a folder, a pipe, a device or a link in its place."""
    kind = rng.choice(["nothing", "folder", "pipe", "loop", "out", "device"])
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "nothing":
        out = file.parents[2] / "outside"
        out.write_bytes(content)
        file.symlink_to({"loop": file, "out": out, "device": Path("/dev/zero")}[kind])
    return kind


def corrupt_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, fill or repeat bytes, or return another kind of file."""
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


def json_items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a JSON value with each of its keys or indexes."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from json_items(value[key])


def corrupt_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or rename a value, or add an unexpected or duplicate key."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return corrupt_bytes(content, rng)
    items = list(json_items(value))
    hostile = rng.choice(HOSTILE_VALUES)
    if not items:
        return to_json(hostile)
    holder, key = rng.choice(items)
    action = rng.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(HOSTILE_KEYS)] = hostile if rng.random() < 0.7 else holder[key]
    elif action == 2 and isinstance(holder, dict):
        return to_json(value).replace(b"{", b"{" + to_json(key) + b": " + to_json(hostile) + b", ", 1)
    elif action == 3:
        other, place = rng.choice(items)
        holder[key] = dict(other) if isinstance(other, dict) else other[place]
        return to_json(json.loads(content)) if is_circular(value) else to_json(value)
    else:
        holder[key] = hostile
    return to_json(value)


def is_circular(value: Any) -> bool:
    try:
        json.dumps(value)
    except (ValueError, RecursionError):
        return True
    return False


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def corrupt_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the length of the safetensors header, or a tensor's name, dtype, shape or offsets."""
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
        action = rng.randrange(6 if settings is None else 12)
        if action == 0:
            header = corrupt_json(header, rng)
        elif action > 5:
            value["__metadata__"]["imvar.settings"] = corrupt_json(settings.encode(), rng).decode(errors="replace")
        elif action == 1:
            entry["dtype"] = rng.choice(HOSTILE_DTYPES)
        elif action == 2:
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
        elif action == 3:
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
        elif action == 4:
            value[rng.choice([f"{name}x", "", "__metadata__", "\ud800", *HOSTILE_KEYS, *value])] = value.pop(name)
        else:
            value["__metadata__"] = rng.choice(HOSTILE_VALUES)
        header = to_json(value) if action else header
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        return corrupt_bytes(content, rng)
    return len(header).to_bytes(8, "little") + header + data


def corrupt_zip(content: bytes, rng: random.Random) -> bytes:
    """Corrupt, remove, duplicate, rename or compress a record of a zip file of `torch.save`."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    except Exception:
        return corrupt_bytes(content, rng)
    which = rng.randrange(len(records)) if rng.random() < 0.4 else 0
    name, record = records[which]
    action, compression = rng.randrange(8), zipfile.ZIP_STORED
    if action == 0:
        del records[which]
    elif action == 1:
        records[which] = (rng.choice(["../x", "/x", name + "x", "data.pkl", "x/constants.pkl"]), record)
    elif action == 2:
        compression = zipfile.ZIP_DEFLATED
    elif action == 3:
        records.append((name, record))
    else:
        records[which] = (name, corrupt_pickle(record, rng))
    out = BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", compression) as archive:
        for name, record in records:
            archive.writestr(name, record)
    return out.getvalue()


def corrupt_pickle(program: bytes, rng: random.Random) -> bytes:
    """Change a global, a number, an opcode or some bytes of a pickle program."""
    action, at = rng.randrange(5), rng.randrange(len(program) + 1)
    if action == 0 and (at := program.find(b"c", at)) >= 0:
        return (
            program[:at] + rng.choice(PICKLE_GLOBALS) + program[program.find(b"\n", program.find(b"\n", at) + 1) + 1 :]
        )
    if action == 1:
        number = rng.choice([0, 1, 2**31 - 1, -1, -(2**31), 2**30]).to_bytes(4, "little", signed=True)
        at = max(program.find(rng.choice([b"J", b"K", b"M"]), at), 0)
        return program[:at] + b"J" + number + program[at + {75: 2, 77: 3}.get(program[at] if program else 0, 5) :]
    if action == 2:
        return program[:at] + rng.choice(PICKLE_GLOBALS) + program[at:]
    if action == 3:
        return program[:at] + bytes([rng.choice(PICKLE_OPCODES)]) + program[at + 1 :]
    return corrupt_bytes(program, rng)
