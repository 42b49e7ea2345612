"""One file that holds a whole model, or one part of it: what is in there, and under which names.

The original files hold each part behind a prefix of its own; a file without prefixes holds one part
alone. Which part, and in which dialect, is told by a place that every part of its kind has.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..checks import check_has_data
from ..errors import CheckpointError, InputError, InputTypeError, short_repr
from . import key_tables as tables
from .hub import Hub, locate_file
from .json_files import parse_json
from .keymap import Dialect, Keymap, Naming, abbreviate
from .reading import read_checkpoint

CONFIGS_KEY = "imvar.settings"  # in the metadata of an original-layout file: the settings of each part, as JSON

RAW, EMA = Naming(Dialect.ORIGINAL, "model.diffusion_model."), Naming(Dialect.DOTLESS, "model_ema.diffusion_model")

ORIGINAL_NAMINGS: dict[str, tuple[Naming, ...]] = {
    "unet": (RAW, EMA),
    "vae": (Naming(Dialect.ORIGINAL, "first_stage_model."),),
    "image_encoder": (
        Naming(Dialect.ORIGINAL, "cond_stage_model.model."),
        Naming(Dialect.PUBLISHED, "cond_stage_model.transformer."),
    ),
}

DROPPABLE = (
    "model_ema.decay",
    "model_ema.num_updates",  # the moving average's own state; then tables of the schedule
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@cache
def signatures() -> dict[str, tuple[Keymap, tuple[str, ...]]]:
    """The places that tell a part, and the dictionary that spells them; the more telling parts first."""
    return {
        "unet": (tables.unet([True], [True], 1, 1), ("time.linear1",)),
        "vae": (tables.vae(1, 1), ("encoder.mid.resnet1", "decoder.mid.resnet1")),
        "safety_checker": (tables.safety_checker(1), ("concept_embeds", "tower.class_token")),
        "image_encoder": (tables.image_encoder(1), ("tower.class_token",)),
    }


@dataclass(frozen=True)
class PartTensors:
    """One part as a file holds it: its tensors by the names they have there, and how those are to be read."""

    part: str
    naming: Naming
    tensors: Mapping[str, Tensor]
    path: Path | None = None

    def has(self, name: str) -> bool:
        """Whether a tensor of that name, in the file's dialect, is there."""
        dotless = self.naming.dialect is Dialect.DOTLESS
        return self.naming.prefix + (name.replace(".", "") if dotless else name) in self.tensors

    @property
    def looks(self) -> bool:
        """Whether there is anything of a vision tower."""
        (tower,) = tables.image_encoder(1).sources("tower", self.naming)
        return any(name.startswith(f"{tower.name}.") for name in self.tensors)

    def holds(self, keymap: Keymap, *ours: str) -> bool:
        """Whether any of these tensors of ours is there."""
        return any(source.name in self.tensors for name in ours for source in keymap.sources(name, self.naming))

    def size(self, keymap: Keymap, ours: str, dim: int = 0) -> int:
        """The length of one dimension of a tensor of ours. Raises `CheckpointError` where it is missing."""
        sources = keymap.sources(ours, self.naming)
        for source in sources:
            if source.name in self.tensors:
                shape = source.form.take(self.tensors[source.name]).shape
                if dim < len(shape):
                    return shape[dim]
        raise CheckpointError(
            "missing or misshapen, so that the settings cannot be told", path=self.path, key=sources[0].name
        )


@dataclass(frozen=True)
class SingleFile:
    """A file of tensors, and the parts that are found in it."""

    path: Path
    tensors: Mapping[str, Tensor]
    aside: tuple[str, ...] = ()
    """What else the file holds, such as the state of an optimizer; it is left where it is."""

    @classmethod
    def from_source(cls, source: str | Path | Mapping[str, Tensor], hub: Hub) -> SingleFile:
        """The file at a path or on the hub, or one whose tensors are in memory."""
        if isinstance(source, Mapping):
            odd = [name for name, value in source.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
            if odd:
                raise InputTypeError(f"{short_repr(odd[0])}: a dictionary of tensors by name would do")
            for name, tensor in source.items():
                check_has_data(name, tensor)
            return cls(Path("(tensors in memory)"), source)
        return cls.read(locate_file(source, hub))

    @classmethod
    def read(cls, path: Path) -> SingleFile:
        tensors, aside = read_checkpoint(path)
        return cls(path, tensors, tuple(aside))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of each part that imvar put into the file when it wrote it, if it did."""
        if self.path.suffix != ".safetensors":
            return {}
        with safe_open(self.path, "pt") as file:
            text = (file.metadata() or {}).get(CONFIGS_KEY, "{}")
        found = parse_json(text.encode(), self.path, CONFIGS_KEY)
        if not all(isinstance(value, dict) for value in found.values()):
            raise CheckpointError("holds no settings by part", path=self.path, key=CONFIGS_KEY)
        return found

    @cached_property
    def parts(self) -> dict[str, list[PartTensors]]:
        """Each part that is there, in each of the ways it is there. Raises `CheckpointError` if there is none."""
        parts = {
            part: [held for naming in namings if (held := self._behind(part, naming)).tensors]
            for part, namings in ORIGINAL_NAMINGS.items()
        }
        if found := {part: ways for part, ways in parts.items() if ways}:
            return found
        if alone := detect_part(self.tensors):
            part, naming = alone
            return {part: [PartTensors(part, naming, self.tensors, self.path)]}
        some = abbreviate(sorted(self.tensors)[:3]) or "none at all"
        raise CheckpointError(f"holds no part of this model that is known here; its tensors are {some}", path=self.path)

    @property
    def is_single_part(self) -> bool:
        """Whether it holds one part and says so by no prefix."""
        ways = list(self.parts.values())
        return len(ways) == 1 and ways[0][0].naming.prefix == ""

    def check_complete(self, overrides: Container[str] = ()) -> None:
        """Raise `CheckpointError` for a part that is neither there nor in `overrides`, and for unknown tensors."""
        if lacking := [part for part in ORIGINAL_NAMINGS if part not in self.parts and part not in overrides]:
            raise CheckpointError(
                f"holds no {' and no '.join(lacking)}; it can be handed over ({lacking[0]}=)", path=self.path
            )
        self.check_known()

    def check_known(self) -> None:
        """Raise `CheckpointError` for tensors that belong to no part and that no original file is known to hold."""
        mine = {name for ways in self.parts.values() for held in ways for name in held.tensors}
        if unknown := [name for name in self.tensors if name not in mine and not self.is_droppable(name)]:
            several = "s" * (len(unknown) > 1)
            raise CheckpointError(
                f"{len(unknown)} unknown tensor{several}: {abbreviate(unknown)}", path=self.path, key=unknown[0]
            )

    def _behind(self, part: str, naming: Naming) -> PartTensors:
        mine = {name: tensor for name, tensor in self.tensors.items() if name.startswith(naming.prefix)}
        return PartTensors(part, naming, mine, self.path)

    @staticmethod
    def is_droppable(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in DROPPABLE)

    def part(self, part: str, ema: str = "auto") -> PartTensors:
        """The part, if it is there in two ways the one that is asked for.

        `ema`: for a UNet the moving average of its weights, which is what pictures are made with, "yes"; the weights
        as last trained, "no"; or the moving average if there is one, "auto".
        """
        if ema not in ("auto", "yes", "no"):
            raise InputError(f"ema={ema!r}: 'auto', 'yes' or 'no' would do")
        ways = self.parts.get(part, [])
        if not ways:
            raise CheckpointError(f"holds no {part}; there is {' and '.join(self.parts)}", path=self.path)
        if part == "unet":
            wanted = {
                "auto": [held for held in ways if held.naming == EMA] or ways,
                "yes": [held for held in ways if held.naming == EMA],
                "no": [held for held in ways if held.naming != EMA],
            }[ema]
            if not wanted:
                what = "moving average (EMA) of the UNet" if ema == "yes" else "raw UNet, only its moving average (EMA)"
                raise CheckpointError(f"ema={ema!r}: the file holds no {what}", path=self.path)
            return wanted[0]
        if len(ways) > 1:
            raise CheckpointError(
                f"the {part} is there twice, under {' and '.join(h.naming.prefix for h in ways)}", path=self.path
            )
        if part == "image_encoder" and not ways[0].looks:
            raise CheckpointError(
                "holds a text encoder where this model has an image encoder, so it is a "
                "text-to-image checkpoint; its UNet and VAE can be taken one by one (--part, or "
                "from_single_file of their class)",
                path=self.path,
                key=next(iter(ways[0].tensors)),
            )
        return ways[0]


def detect_part(names: Iterable[str]) -> tuple[str, Naming] | None:
    """The part that tensors of these names make up, and the dialect they are in; None if no part is known by them."""
    places = {name[:end] for name in names for end, letter in enumerate(f"{name}.") if letter == "."}
    for part, (keymap, tells) in signatures().items():
        for dialect in (Dialect.PUBLISHED, Dialect.OURS, Dialect.ORIGINAL):
            naming = Naming(dialect)
            if all(any(source.name in places for source in keymap.sources(ours, naming)) for ours in tells):
                return part, naming
    return None
