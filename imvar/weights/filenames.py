"""Names of a component's weights files, and which of several files to read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..checks import check_type
from ..errors import CheckpointError, InputError, invalid, short_repr


def weights_endings(use_safetensors: bool | None) -> tuple[str, ...]:
    """Return the endings of the files to read: safetensors before pickles, or one of them alone."""
    check_type("use_safetensors", use_safetensors, bool)
    return {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]


@dataclass(frozen=True)
class WeightsName:
    """Names of the weights files of a component, by format, without variant and ending."""

    safetensors: str
    pickle: str

    def basename(self, ending: str, variant: str | None) -> str:
        name = self.safetensors if ending == "safetensors" else self.pickle
        if check_type("variant", variant, str) and not re.fullmatch(r"\w[\w.-]*", variant):  # type: ignore[arg-type]
            expected = "letters, digits, '.', '_' and '-', such as 'fp16'"
            raise invalid(InputError, "variant", expected, short_repr(variant))
        return f"{name}.{variant}" if variant else name

    def file(self, ending: str, variant: str | None) -> str:
        return f"{self.basename(ending, variant)}.{ending}"

    def shards(self, ending: str, variant: str | None) -> str:
        return f"{self.basename(ending, variant)}-*-of-*.{ending}"

    def index(self, ending: str, variant: str | None) -> str:
        return f"{self.basename(ending, None)}.{ending}.index.{f'{variant}.' if variant else ''}json"

    def select(self, names: Iterable[str] | None, variant: str | None, use_safetensors: bool | None) -> list[str]:
        """Return the names or patterns of the files to read: safetensors before pickles, one file before shards.

        `names` of all files; None returns the patterns of all files that there may be.
        """
        endings = weights_endings(use_safetensors)
        if names is None:
            return [f"{self.basename(ending, None)}*.{ending}*" for ending in endings]
        names = set(names)
        for ending in endings:
            if self.file(ending, variant) in names:
                return [self.file(ending, variant)]
            if self.index(ending, variant) in names:
                return [self.index(ending, variant), self.shards(ending, variant)]
        files = " or ".join(self.file(ending, variant) for ending in endings)
        raise invalid(CheckpointError, None, f"weights in {files}, in one file or sharded", "no such files")

    def is_preserved(self, name: str) -> bool:
        """Return whether a save as safetensors keeps this weights file: a pickle or a variant."""
        return name.endswith(".bin") or self.variants([name]) not in ([], [None])

    def variants(self, names: Iterable[str]) -> list[str | None]:
        """Return the variants whose files are among `names`; None, first, for files without a variant."""
        basenames = "|".join(map(re.escape, {self.safetensors, self.pickle}))
        pattern = rf"(?:{basenames})(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
        variants = {match["variant"] for name in names if (match := re.fullmatch(pattern, name))}
        return sorted(variants, key=lambda variant: variant or "")


DIFFUSERS = WeightsName("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS = WeightsName("model", "pytorch_model")
