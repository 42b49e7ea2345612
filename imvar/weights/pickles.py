"""Read `torch.save` files safely: a pickle is a program, and only those that construct plain tensors are run.

First the instructions are examined without running one: how many there are and which globals they reference. Then
`torch.load` runs them with `weights_only=True`, and the result is checked to consist of tensors.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import threading
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import CheckpointError, first_line, invalid
from .read_errors import explain_read_error

ZIP_MAGIC = b"PK\3\4"  # by which torch.load decides, too
MAX_INSTRUCTIONS = 250_000  # about 8,000 tensors
MAX_PICKLE_BYTES = 2**24  # of data.pkl, or of the pickles at the beginning of a file in the old format
MAX_DIRECTORY_BYTES = 2**21  # of the central directory of a zip file
MAX_TUPLE_VALUES = 10_000  # including those of nested tuples
EXPECTED = "a file of tensors"

TENSOR_GLOBALS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v[23]|parameter)|torch\.Size"
    r"|torch\.((Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|storage\.UntypedStorage)"
    r"|torch\.(b?float[\w]+|u?int\d+|bool)"
)
"""Globals that a pickle of dense tensors references."""


class InertObject:
    """Placeholder for an object of a training state: accepts any arguments and state, and ignores them."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


IGNORED_GLOBALS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
"""Globals of the training state in the published full checkpoint, replaced by `InertObject`."""
BYTES_GLOBAL = "_codecs.encode"  # how protocol 2 encodes bytes; torch handles it

_safe_globals_lock = threading.Lock()  # torch's list of safe globals is per process


def unpickle(path: Path, disable_mmap: bool = False, *, allow_training_state: bool = False) -> Any:
    """Return the content of a `torch.save` file; tensors in a zip file are memory-mapped, unless `disable_mmap`.

    Raises `CheckpointError` with the first global that is neither part of a dense tensor nor, with
    `allow_training_state`, of the training state in an original checkpoint, which becomes `InertObject`s.
    """
    programs = b""
    with explain_read_error(path):
        try:
            with path.open("rb") as file:
                mapped = file.read(4) == ZIP_MAGIC
                file.seek(0)
                programs = read_pickle_record(path, file) if mapped else file.read(MAX_PICKLE_BYTES)
            allowed = (*IGNORED_GLOBALS, BYTES_GLOBAL) if allow_training_state else ()
            for name in referenced_globals(programs, pickles=1 if mapped else 5):
                if not TENSOR_GLOBALS.fullmatch(name) and name not in allowed:
                    hint = "nothing but dense tensors is unpickled"
                    raise invalid(CheckpointError, path, EXPECTED, f"a pickle that references {name}", hint)
            ignored: Any = [(InertObject, name) for name in IGNORED_GLOBALS if allow_training_state]
            with _safe_globals_lock, torch.serialization.safe_globals(ignored):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and not disable_mmap)
        except (MemoryError, OSError):
            raise
        except Exception as error:  # a malformed pickle can lead to any error; torch's advises to run it nevertheless
            if isinstance(error, zipfile.BadZipFile) and isinstance(error.__context__, OSError):
                raise error.__context__ from None
            reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
            got, hint = f"one cut short or not a pickle of tensors{reason}", ""
            if (protocol := pickle_protocol(programs)) not in (None, 2, 3):
                name = protocol if protocol else "0 or 1"
                got, hint = f"a pickle of protocol {name}", "save it without pickle_protocol, or as safetensors"
            raise invalid(CheckpointError, path, EXPECTED, got, hint) from error


def pickle_protocol(program: bytes) -> int | None:
    """Return the protocol of a pickle that is whole, without running it, 0 for 0 or 1; None for anything else."""
    protocol = 0
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            if instruction.name == "PROTO":
                protocol = int(argument or 0)
            if count == MAX_INSTRUCTIONS:
                return None
    except Exception:  # a malformed pickle can lead to any error
        return None
    return protocol


def read_pickle_record(path: Path, file: IO[bytes]) -> bytes:
    """Return the pickle in a zip file whose records are complete and uncompressed."""
    if (size := zip_directory_size(file)) > MAX_DIRECTORY_BYTES:
        raise invalid(CheckpointError, path, f"a zip directory of at most {MAX_DIRECTORY_BYTES} bytes", str(size))
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise invalid(CheckpointError, path, EXPECTED, "a zip file that is not of torch.save")
        compressed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
        if compressed or sum(record.file_size for record in records) > path.stat().st_size:
            key = compressed[0] if compressed else None
            raise invalid(CheckpointError, path, EXPECTED, "a compressed zip file, not of torch.save", key=key)
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            got = str(pickles[0].file_size)
            raise invalid(CheckpointError, path, f"a pickle of at most {MAX_PICKLE_BYTES} bytes", got)
        return archive.read(pickles[0])


def zip_directory_size(file: IO[bytes]) -> int:
    """Return the size of a zip file's central directory in bytes, which `zipfile` would read completely."""
    file.seek(max(file.seek(0, io.SEEK_END) - 98, 0))
    end = file.read()  # the last 22 bytes; before them, in large files, the same in 56 and a pointer to these in 20
    if end[-22:-18] != b"PK\5\6":
        raise zipfile.BadZipFile("no end record")
    return int.from_bytes(end[40:48] if end[-42:-38] == b"PK\6\7" else end[-10:-6], "little")


def referenced_globals(programs: bytes, pickles: int) -> list[str]:
    """Return the full names of the globals that one or more consecutive pickles reference, in order.

    Raises `ValueError` for too many instructions, and for tuples that repeatedly contain a tuple: such a value is
    small in the file but takes forever to hash, as the key of a dictionary.
    """
    names, count, source = dict[str, None](), 0, io.BytesIO(programs)
    for _ in range(pickles):
        stack, marks, memo = [], [], {}  # the number of values in each value, nested ones included
        for instruction, argument, _ in pickletools.genops(source):
            if (count := count + 1) > MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
            name, popped = instruction.name, instruction.stack_before
            if name in ("GLOBAL", "INST"):
                names[str(argument).replace("__builtin__", "builtins").replace(" ", ".", 1)] = None
            if name == "MARK":
                marks.append(len(stack))
            elif name.endswith("PUT"):
                memo[argument] = stack[-1]
            elif name.endswith("GET"):
                stack.append(memo[argument])
            elif popped or instruction.stack_after:
                has_mark = pickletools.markobject in popped
                start = marks.pop() if has_mark else len(stack)
                start -= len(popped) - 2 * has_mark  # the mark and all values above it count as two of those popped
                if start < 0:
                    raise ValueError("an instruction that pops more values than there are")
                size = 1 + sum(stack[start:]) if name.startswith("TUPLE") else 1
                if size > MAX_TUPLE_VALUES:
                    raise ValueError(f"a tuple of more than {MAX_TUPLE_VALUES} values")
                stack[start:] = [size] * len(instruction.stack_after)
    return list(names)
