"""`from_pretrained` and `save_pretrained`, for parts with weights and for parts without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ..config import Configured
from ..errors import CheckpointError, InputError
from .files import locate, read_json, write_text

FORMAT = "0.42.1"  # the diffusers version whose file format is written; readers branch on it


class Pretrained(Configured):
    """A part whose settings live in a file of their own."""

    config_name: ClassVar[str] = "config.json"

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str | None = None, revision: str | None = None,
                        cache_dir: str | Path | None = None, local_files_only: bool = False,
                        token: str | bool | None = None, **changes: Any) -> Self:
        """Read settings from a folder or a hub repository; `changes` come on top.

        Raises `CheckpointError` for a file that is missing or holds what this part cannot honour.
        """
        name = f"{subfolder}/{cls.config_name}" if subfolder else cls.config_name
        folder = locate(source, patterns=[name], revision=revision, cache_dir=cache_dir,
                        local_files_only=local_files_only, token=token)
        return cls(cls.read_config(folder / name, **changes))

    @classmethod
    def read_config(cls, path: Path, **changes: Any) -> Any:
        """The settings in `path`, checked; `changes` are checked as constructor arguments are."""
        settings = read_json(path)
        try:
            return cls.config_class.read(settings, **cls.config_class.of(**changes).explicit())
        except InputError as error:
            raise CheckpointError(str(error), path=path) from error

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the settings into `folder`, made if need be, in the published format."""
        text = json.dumps(self.config_file(), indent=2, sort_keys=True) + "\n"
        write_text(Path(folder) / self.config_name, text)

    def config_file(self) -> Mapping[str, Any]:
        """What the settings file says: the settings, and who wrote them in which format."""
        return self.config.to_dict() | {"_class_name": type(self).__name__, "_diffusers_version": FORMAT}
