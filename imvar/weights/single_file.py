"""Single files: a whole model or one part of it, in any known dialect.

In original files each part has a prefix of its own; a file without prefixes contains one part alone. Part and dialect
are detected by modules that every model of a part has.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, InputError, describe, invalid, short_repr
from . import key_tables as tables
from .hub import Hub, locate_file
from .json_files import parse_json
from .keymap import Dialect, Keymap, Naming, abbreviate
from .reading import IN_MEMORY, check_tensors, read_checkpoint, read_metadata

CONFIGS_KEY = "imvar.settings"  # metadata of an original-layout file written by imvar: the config of each part, as JSON

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
    "model_ema.num_updates",  # state of the moving average; the rest are tables of the noise schedule
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
    """Return, by part, modules that only it has, and the keymap for their names; the first part that matches counts."""
    return {
        "unet": (tables.unet([True], 1), ("time_embedding.linear_1",)),
        "vae": (tables.vae(1, 1), ("encoder.mid_block.resnets.0", "decoder.mid_block.resnets.0")),
        "safety_checker": (tables.safety_checker(1), ("concept_embeds", "vision_model.embeddings.class_embedding")),
        "image_encoder": (tables.image_encoder(1), ("vision_model.embeddings.class_embedding",)),
    }


@dataclass(frozen=True)
class PartTensors:
    """The tensors of one part under their names in a file, and the dialect and prefix of these."""

    part: str
    naming: Naming
    tensors: Mapping[str, Tensor]
    path: Path

    def has(self, name: str) -> bool:
        """Return whether there is a tensor of that name in the file's dialect, the prefix aside."""
        dotless = self.naming.dialect is Dialect.DOTLESS
        return self.naming.prefix + (name.replace(".", "") if dotless else name) in self.tensors

    def has_any(self, keymap: Keymap, *names: str) -> bool:
        """Return whether any of the model's tensors `names` is there."""
        return any(keymap.find_source(name, self.naming, self.tensors) for name in names)

    def dim_size(self, keymap: Keymap, name: str, dim: int = 0) -> int:
        """Return the size of a dimension of the model's tensor `name`. Raises `CheckpointError` if there is none."""
        source = keymap.find_source(name, self.naming, self.tensors)
        shape = source.transform.load(self.tensors[source.name]).shape if source else ()
        if dim < len(shape):
            return shape[dim]
        expected = f"a tensor with {dim + 1} dimensions or more, to infer the config from"
        key = keymap.sources(name, self.naming)[0].name
        raise invalid(CheckpointError, self.path, expected, "none", "pass config=", key=key)


@dataclass(frozen=True)
class SingleFile:
    """A file of tensors, and the parts of a checkpoint in it.

    `ignored_entries` names what a pickle contains next to the tensors, such as the state of an optimizer; `metadata`
    are those of safetensors.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    ignored_entries: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_source(cls, source: str | Path | Mapping[str, Tensor], hub: Hub, disable_mmap: bool = False) -> SingleFile:
        """Return a local file, one on the hub, or a dictionary of tensors."""
        if isinstance(source, Mapping):
            expected = "a path, a link or a dictionary of str to tensor"
            check_tensors("pretrained_model_link_or_path_or_dict", source, expected)
            return cls(IN_MEMORY, source)
        return cls.read(locate_file(source, hub), disable_mmap)

    @classmethod
    def read(cls, path: Path, disable_mmap: bool = False) -> SingleFile:
        """Read a local file."""
        tensors, ignored_entries = read_checkpoint(path, disable_mmap)
        return cls(path, tensors, tuple(ignored_entries), read_metadata(path))

    @cached_property
    def configs(self) -> dict[str, Any]:
        """By part, the config in the file's metadata, where imvar writes it; without any, an empty dictionary."""
        configs = parse_json(self.metadata.get(CONFIGS_KEY, "{}").encode(), self.path, CONFIGS_KEY)
        for part, config in configs.items():
            if not isinstance(config, dict):
                got = f"{short_repr(part)}: {describe(config)}"
                raise invalid(CheckpointError, self.path, "a dictionary for each part", got, key=CONFIGS_KEY)
        return configs

    @cached_property
    def parts(self) -> dict[str, list[PartTensors]]:
        """By part, its tensors, once for each naming that is present. Raises `CheckpointError` if there is no part."""
        parts: dict[str, list[PartTensors]] = {}
        for part, naming in ((part, naming) for part, namings in ORIGINAL_NAMINGS.items() for naming in namings):
            if tensors := {name: value for name, value in self.tensors.items() if name.startswith(naming.prefix)}:
                parts.setdefault(part, []).append(PartTensors(part, naming, tensors, self.path))
        if parts:
            return parts
        if detected := detect_part(self.tensors):
            part, naming = detected
            return {part: [PartTensors(part, naming, self.tensors, self.path)]}
        names = abbreviate(sorted(self.tensors)[:3]) or "none"
        raise invalid(CheckpointError, self.path, "tensors of a known part", names)

    @property
    def is_single_part(self) -> bool:
        """Whether the file contains one part, without a prefix."""
        versions = list(self.parts.values())
        return len(versions) == 1 and versions[0][0].naming.prefix == ""

    def check_complete(self, overrides: Container[str] = ()) -> None:
        """Raise `CheckpointError` for parts neither in the file nor in `overrides`, and for unknown tensors."""
        if missing := [part for part in ORIGINAL_NAMINGS if part not in self.parts and part not in overrides]:
            got = f"no {' and no '.join(missing)}"
            raise invalid(CheckpointError, self.path, " and ".join(ORIGINAL_NAMINGS), got, f"pass {missing[0]}=")
        self.check_no_unknown()

    def check_no_unknown(self) -> None:
        """Raise `CheckpointError` for tensors that neither belong to a part nor are known from original files."""
        in_parts = {name for versions in self.parts.values() for version in versions for name in version.tensors}
        if unknown := [name for name in self.tensors if name not in in_parts and not self.is_droppable(name)]:
            got = f"{len(unknown)} unknown tensor{'s' * (len(unknown) > 1)}: {abbreviate(unknown)}"
            raise invalid(CheckpointError, self.path, f"tensors of {' and '.join(self.parts)}", got, key=unknown[0])

    @staticmethod
    def is_droppable(name: str) -> bool:
        """Return whether original files have a tensor of that name that belongs to no part."""
        return any(fnmatchcase(name, pattern) for pattern in DROPPABLE)

    def part_tensors(self, part: str, ema: str = "auto") -> PartTensors:
        """Return the tensors of a part.

        `ema` chooses the weights of a UNet: the moving average, which is meant for inference ("yes"), the raw ones
        ("no"), or the average if there is one ("auto").
        """
        if ema not in ("auto", "yes", "no"):
            raise invalid(InputError, "ema", "'auto', 'yes' or 'no'", short_repr(ema))
        versions = self.parts.get(part, [])
        if not versions:
            raise invalid(CheckpointError, self.path, f"tensors of the {part}", f"those of {' and '.join(self.parts)}")
        if part == "unet":
            by_ema = {"yes" if version.naming == EMA else "no": version for version in versions}
            for kind in ("yes", "no") if ema == "auto" else (ema,):
                if kind in by_ema:
                    return by_ema[kind]
            expected, got = ("a moving average (EMA)", "raw weights")[:: 1 if ema == "yes" else -1]
            raise invalid(CheckpointError, self.path, f"{expected} of the unet for ema={ema!r}", f"{got} only")
        if len(versions) > 1:
            prefixes = " and ".join(version.naming.prefix for version in versions)
            raise invalid(CheckpointError, self.path, f"one {part}", f"{len(versions)}, with the prefixes {prefixes}")
        (tower,) = tables.image_encoder(1).sources("vision_model", versions[0].naming)
        if part == "image_encoder" and not any(name.startswith(f"{tower.name}.") for name in versions[0].tensors):
            got, key = "a text encoder, as in text-to-image checkpoints", next(iter(versions[0].tensors))
            hint = "load its UNet or VAE alone (--part, or from_single_file of the model's class)"
            raise invalid(CheckpointError, self.path, "an image encoder", got, hint, key=key)
        return versions[0]


def detect_part(names: Iterable[str]) -> tuple[str, Naming] | None:
    """Return the part that has tensors of these names, and their dialect; None if no part has."""
    modules = {name[:end] for name in names for end, letter in enumerate(f"{name}.") if letter == "."}
    for part, (keymap, signature) in signatures().items():
        for dialect in (Dialect.PUBLISHED, Dialect.ORIGINAL):
            naming = Naming(dialect)
            if all(any(source.name in modules for source in keymap.sources(module, naming)) for module in signature):
                return part, naming
    return None
