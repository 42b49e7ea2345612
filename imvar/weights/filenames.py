"""What a part's weights files are called, and which of them to read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..checks import check_type
from ..errors import CheckpointError, InputError, short_repr


@dataclass(frozen=True)
class WeightsName:
    """How the weights of a part are called, by format, before the endings."""

    safetensors: str
    pickle: str

    def named(self, ending: str, variant: str | None) -> str:
        stem = self.safetensors if ending == "safetensors" else self.pickle
        if check_type("variant", variant, str) and not re.fullmatch(r"\w[\w.-]*", variant):  # type: ignore[arg-type]
            raise InputError(
                f"variant={short_repr(variant)}: letters, digits, '.', '_' and '-', as in 'fp16', would do"
            )
        return f"{stem}.{variant}" if variant else stem

    def file(self, ending: str, variant: str | None) -> str:
        return f"{self.named(ending, variant)}.{ending}"

    def shards(self, ending: str, variant: str | None) -> str:
        return f"{self.named(ending, variant)}-*-of-*.{ending}"

    def index(self, ending: str, variant: str | None) -> str:
        return f"{self.named(ending, None)}.{ending}.index.{f'{variant}.' if variant else ''}json"

    def choose(self, names: Iterable[str] | None, variant: str | None, use_safetensors: bool | None) -> list[str]:
        """The patterns of the files to read, out of all `names`: safetensors before pickles, whole before shards.

        Where the names are not known, None, the patterns of all files that there may be.
        """
        check_type("use_safetensors", use_safetensors, bool)
        endings = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
        if names is None:
            return [f"{self.named(ending, None)}*.{ending}*" for ending in endings]
        names = set(names)
        for ending in endings:
            if self.file(ending, variant) in names:
                return [self.file(ending, variant)]
            if self.index(ending, variant) in names:
                return [self.index(ending, variant), self.shards(ending, variant)]
        looked = " or ".join(self.file(ending, variant) for ending in endings)
        raise CheckpointError(f"no weights here: looked for {looked}, whole or sharded")

    def left(self, name: str) -> bool:
        """Whether this is a file of weights that a plain save as safetensors leaves alone: a pickle or a variant."""
        return name.endswith(".bin") or self.variants([name]) not in ([], [None])

    def variants(self, names: Iterable[str]) -> list[str | None]:
        """The variants whose files are among `names`, None for the plain ones, which come first."""
        stems = "|".join(map(re.escape, {self.safetensors, self.pickle}))
        whole = rf"(?:{stems})(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
        found = {match["variant"] for name in names if (match := re.fullmatch(whole, name))}
        return sorted(found, key=lambda variant: variant or "")


DIFFUSERS = WeightsName("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS = WeightsName("model", "pytorch_model")
