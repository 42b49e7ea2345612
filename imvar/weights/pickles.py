"""Reading `torch.save` files: a pickle is a program, and this lets only those run that do nothing but make tensors.

The instructions are looked over first, without running one: how many there are, and which names they ask for.
Then `torch.load` runs them with `weights_only=True`, and what comes out is checked to be tensors.
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

from ..errors import CheckpointError, first_line

MOST_INSTRUCTIONS = 250_000  # some 8,000 tensors
LARGEST_PROGRAM = 2**24  # bytes of data.pkl, or of all that comes before the numbers in an old file
LARGEST_LIST = 2**21  # bytes in which a zip file lists its records
LARGEST_TUPLE = 10_000  # values in it, and in those in it

TENSORS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v[23]|parameter)|torch\.Size"
    r"|torch\.((Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|storage\.UntypedStorage)"
    r"|torch\.(b?float[\w]+|u?int\d+|bool)"
)
"""The names that a pickle of dense tensors asks for."""


class InertObject:
    """Stands for an object that an original checkpoint holds beside its weights, takes all and does nothing."""

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
"""What the training state in the published full checkpoint is made of, beside plain values."""
BYTES = "_codecs.encode"  # how protocol 2 spells bytes; torch has its own answer to it

_standing_in = threading.Lock()  # torch's table of names is the whole process's


def unpickle(path: Path, *, standins: bool = False) -> Any:
    """What a `torch.save` file holds, mapped where it is a zip file.

    Raises `CheckpointError` naming what the pickle asks for other than dense tensors and, if `standins`, the
    few things that training leaves in an original checkpoint, each of which is then an `Inert`.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # which may also raise, for one that says it goes on on another disk
        with path.open("rb") as file:
            names = (
                referenced_globals(read_pickle_record(path, file))
                if mapped
                else referenced_globals(file.read(LARGEST_PROGRAM), pickles=5)
            )
        allowed = (*IGNORED_GLOBALS, BYTES) if standins else ()
        if foreign := [name for name in names if not TENSORS.fullmatch(name) and name not in allowed]:
            raise CheckpointError(
                f"cannot be read as a file of tensors: it names {foreign[0]}, and nothing but dense "
                "tensors is ever unpickled",
                path=path,
            )
        with (
            _standing_in,
            torch.serialization.safe_globals([(InertObject, name) for name in IGNORED_GLOBALS if standins]),
        ):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (CheckpointError, MemoryError):
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"cannot be read as a file of tensors: it is cut short or damaged ({first_line(error)})", path=path
        ) from error
    except pickle.UnpicklingError as error:  # whose text advises to run the pickle after all
        raise CheckpointError("cannot be read as a file of tensors: it is no pickle of tensors", path=path) from error
    except Exception as error:  # what a pickle of nonsense leads to is any error at all
        raise CheckpointError(
            f"cannot be read as a file of tensors: it is cut short, or no pickle of tensors ({first_line(error)})",
            path=path,
        ) from error


def read_pickle_record(path: Path, file: IO[bytes]) -> bytes:
    """The pickle in a zip file of which every record is whole and as it is, uncompressed."""
    if (size := zip_directory_size(file)) > LARGEST_LIST:
        raise CheckpointError(
            f"cannot be read as a file of tensors: its list of records has {size} bytes, more than {LARGEST_LIST}",
            path=path,
        )
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        found = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise CheckpointError(
                "cannot be read as a file of tensors: it is a zip file, but not of torch.save", path=path
            )
        packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
        if packed or sum(record.file_size for record in records) > path.stat().st_size:
            raise CheckpointError(
                "cannot be read as a file of tensors: it is compressed; torch.save never does that",
                path=path,
                key=packed[0] if packed else None,
            )
        if found[0].file_size > LARGEST_PROGRAM:
            raise CheckpointError(
                f"cannot be read as a file of tensors: its pickle has {found[0].file_size} bytes, "
                f"more than {LARGEST_PROGRAM}",
                path=path,
            )
        return archive.read(found[0])


def zip_directory_size(file: IO[bytes]) -> int:
    """In how many bytes a zip file says that it lists its records, all of which `zipfile` would read."""
    file.seek(-98, io.SEEK_END)
    end = file.read()  # the last 22 bytes; before them, in large files, the same in 56 and a pointer to these in 20
    if end[-22:-18] != b"PK\5\6":
        raise zipfile.BadZipFile("it does not end as one")
    return int.from_bytes(end[40:48] if end[-42:-38] == b"PK\6\7" else end[-10:-6], "little")


def referenced_globals(programs: bytes, pickles: int = 1) -> list[str]:
    """The names, in full, that one or more pickles in a row ask for, the first first.

    Raises `ValueError` for what no checkpoint says: too much, or tuples that hold a tuple over and over. Such a one
    is small to write and endless to walk, as it is when it becomes the key of a dictionary.
    """
    names, count, source = dict[str, None](), 0, io.BytesIO(programs)
    for _ in range(pickles):
        stack, marks, memo = [], [], {}  # of each value, how many values it is when written out
        for instruction, argument, _ in pickletools.genops(source):
            if (count := count + 1) > MOST_INSTRUCTIONS:
                raise ValueError(f"more than {MOST_INSTRUCTIONS} instructions")
            name, taken = instruction.name, instruction.stack_before
            if name in ("GLOBAL", "INST"):
                names[str(argument).replace("__builtin__", "builtins").replace(" ", ".", 1)] = None
            if name == "MARK":
                marks.append(len(stack))
            elif name.endswith("PUT"):
                memo[argument] = stack[-1]
            elif name.endswith("GET"):
                stack.append(memo[argument])
            elif taken or instruction.stack_after:
                marked = pickletools.markobject in taken
                start = marks.pop() if marked else len(stack)
                start -= len(taken) - 2 * marked  # the mark, and all that is above it, are two of what is taken
                if start < 0:
                    raise ValueError("it takes more than is there")
                size = 1 + sum(stack[start:]) if name.startswith("TUPLE") else 1
                if size > LARGEST_TUPLE:
                    raise ValueError(f"a tuple of more than {LARGEST_TUPLE} values")
                stack[start:] = [size] * len(instruction.stack_after)
    return list(names)
