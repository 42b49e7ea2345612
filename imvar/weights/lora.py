"""Files of LoRA adapters (arXiv:2106.09685), as diffusers, peft and kohya write them: names to layers of a model.

An adapter adds alpha / r * B A to the weight of a layer, with B A of rank r. Files name A "down" and B "up", or
`lora_A` and `lora_B`. Layers are found by their spellings in the key table; no name is parsed.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import as_number, as_path, check_type
from ..errors import CheckpointError, InputError, describe, invalid, short_repr, warn_user
from .filenames import weights_endings
from .hub import Hub, locate, names_in
from .json_files import parse_json, read_json, safe_join
from .keymap import Dialect, Keymap, Naming, abbreviate
from .read_errors import explain_read_error, kind_of
from .reading import IN_MEMORY, check_tensors, read_metadata, read_tensors
from .writing import is_finite, write_tensors

SOURCE = "pretrained_model_name_or_path_or_dict"  # the argument
OPTIONS = {"weight_name", "subfolder", "use_safetensors", "revision", "cache_dir", "local_files_only", "token"}
CONFIG_KEY, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"  # where diffusers and peft store alpha
NAMES = [f"{name}.{ending}" for ending in ("safetensors", "bin") for name in ("pytorch_lora_weights", "adapter_model")]
SUFFIXES = {".alpha": "alpha"} | {
    f"{spelling}.weight": role
    for role, spellings in {
        "down": (".lora.down", ".lora_A", ".lora_A.default", ".lora_down", "_lora.down"),
        "up": (".lora.up", ".lora_B", ".lora_B.default", ".lora_up", "_lora.up"),
    }.items()
    for spelling in spellings
}
PREFIX = re.compile(r"(base_model\.model\.)?(unet\.|(model\.)?diffusion_model\.|lora_unet_)?(base_model\.model\.)?")
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoder(_\d)?\.|text_model\.|lora_te\d?_)")


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The update of one weight (out, in, ...): `scale`, alpha / r, times B (out, r, 1, ...) A (r, in, ...)."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, like: Tensor) -> Tensor:
        """Return the update on the device and in the dtype of the weight `like`, and of its shape."""
        up, down = (t.to(like.device, like.dtype).flatten(1) for t in (self.up, self.down))
        return self.scale * (up @ down).view(like.shape)


def read_lora(
    source: str | Path | Mapping[str, Tensor],
    keymap: Keymap,
    weights: Mapping[str, Tensor],
    *,
    prefix: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> dict[str, LoraLayer]:
    """Return the adapter in a file, folder, hub repository or dictionary of tensors, by layer.

    `weights`: those of the layers that may have one. If keys begin with `prefix` and a dot, only these are read.
    Warns if the adapter was made for text prompts. Raises `CheckpointError` for an unknown, misshapen or infinite
    tensor.
    """
    if isinstance(source, Mapping):
        check_tensors(SOURCE, source, "a path or a dictionary of str to tensor")
        path, tensors, metadata = IN_MEMORY, source, {}
    else:
        path = find_adapter(source, Hub(**hub), weight_name, subfolder, use_safetensors)
        tensors, metadata = read_tensors(path), read_metadata(path)
    text = [key for key in tensors if TEXT_ENCODER.match(key)]
    if text or any(key.startswith(("ss_", "modelspec.")) for key in metadata):  # kohya's, for text-to-image
        ignored = f"; its {len(text)} tensor{'s' * (len(text) > 1)} for a text encoder are ignored" if text else ""
        warn_user(f"{path}: this LoRA was made for text prompts, not for image embeddings{ignored}")
    # copies, as a file may be overwritten and a dictionary may hold the weights of a training
    tensors = {key: tensors[key].detach().to("cpu", copy=True) for key in tensors.keys() - set(text)}
    if check_type("prefix", prefix, str):
        begin = f"{prefix}."
        tensors = {key.removeprefix(begin): t for key, t in tensors.items() if key.startswith(begin)} or tensors
    return parse_layers(tensors, adapter_config(path, tensors, metadata), keymap, weights, path)


def find_adapter(
    source: str | Path, hub: Hub, weight_name: str | None, subfolder: str | None, use_safetensors: bool | None
) -> Path:
    """Return the path of an adapter's file: `source` itself, or the file in this folder or hub repository."""
    path = as_path(SOURCE, source)
    if kind_of(path) == "file":
        return path
    prefix = f"{subfolder}/" if check_type("subfolder", subfolder, str) else ""
    choose = partial(choose_file, check_type("weight_name", weight_name, str), weights_endings(use_safetensors))

    def adapter_files(names: set[str]) -> list[str]:
        return [prefix + choose(names_in(names, prefix) or []), *names.intersection([prefix + PEFT_CONFIG])]

    folder = locate(source, hub, adapter_files) / prefix
    with explain_read_error(folder):
        names = [file.name for file in folder.iterdir()] if kind_of(folder) == "folder" else []
    try:
        name = choose(names)
    except CheckpointError as error:
        raise error.at(folder) from error
    return safe_join(folder, name)


def choose_file(weight_name: str | None, endings: tuple[str, ...], names: list[str]) -> str:
    """Return `weight_name`, or the file with the usual name, or the only one with one of these endings."""
    if weight_name is not None:
        return weight_name
    by_ending = [sorted(n for n in names if n.endswith(f".{ending}") and "/" not in n) for ending in endings]
    there = next(filter(None, by_ending), [])
    files = [name for name in NAMES if name in there][:1] or there
    if len(files) != 1:
        got = f"{len(files)} other files: {abbreviate(files)}" if files else "none"
        raise invalid(CheckpointError, None, f"an adapter such as {NAMES[0]}", got, "pass weight_name=")
    return files[0]


def adapter_config(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the config of peft that goes with a file: in diffusers' metadata, or next to peft's own files."""
    if CONFIG_KEY in metadata:
        config = parse_json(metadata[CONFIG_KEY].encode(), path, CONFIG_KEY)
        return {key.removeprefix("unet."): value for key, value in config.items()}
    if not any(key.startswith("base_model.model.") for key in tensors):
        return {}
    if kind_of(path) == kind_of(path.with_name(PEFT_CONFIG)) == "file":
        return read_json(safe_join(path.parent, PEFT_CONFIG))
    if not any(key.endswith(".alpha") for key in tensors):
        warn_user(f"{path}: there is no {PEFT_CONFIG} next to it, so alpha is assumed to equal the rank")
    return {}


def parse_layers(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], keymap: Keymap, weights: Mapping[str, Tensor], path: Path
) -> dict[str, LoraLayer]:
    """Return the adapter's layers by their names in the model."""
    spellings = layer_spellings(keymap, weights)
    found: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    unknown = []
    for key, tensor in sorted(tensors.items()):
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), "")
        name = PREFIX.sub("", key.removesuffix(suffix), count=1).replace(".processor.", ".")
        layer = spellings.get(f"{name}.0" if name.endswith(".to_out") else name)  # as diffusers' first format has it
        if layer is None or not suffix:
            unknown.append(key)
        elif (role := SUFFIXES[suffix]) in found[layer]:
            keys = f"{found[layer][role][0]} and {key}"
            raise invalid(CheckpointError, path, "one spelling of each tensor", "the same tensor twice", key=keys)
        else:
            found[layer][role] = key, tensor
    if unknown or not found:
        got = f"{len(unknown)} unknown tensor{'s' * (len(unknown) > 1)}: {abbreviate(unknown)}" if unknown else "none"
        key = unknown[0] if unknown else None
        raise invalid(CheckpointError, path, "LoRA tensors (down, up, alpha) of the UNet's layers", got, key=key)
    return {name: parse_layer(name, found[name], config, weights[name], path) for name in weights if name in found}


def layer_spellings(keymap: Keymap, layers: Mapping[str, Any]) -> dict[str, str]:
    """Return the layers by every name that files have for them; kohya's have underscores for dots."""
    namings = Naming(Dialect.PUBLISHED), Naming(Dialect.ORIGINAL)
    names = {source.name: layer for layer in layers for naming in namings for source in keymap.sources(layer, naming)}
    return {name.replace(".", "_"): layer for name, layer in names.items()} | names


def parse_layer(
    name: str, entries: Mapping[str, tuple[str, Tensor]], config: Mapping[str, Any], weight: Tensor, path: Path
) -> LoraLayer:
    """Return the update of one layer; raise `CheckpointError` if its tensors do not fit the weight or each other."""
    if missing := {"down", "up"} - entries.keys():
        key = next(key for key, _ in entries.values())
        raise invalid(CheckpointError, path, "lora down and up of each layer", f"no {min(missing)}", key=key)
    down, up = entries["down"][1], entries["up"][1]
    out_features, in_features, *kernel = weight.shape
    rank = len(down) if down.ndim else 0
    shapes = {"down": (rank, in_features, *kernel), "up": (out_features, rank, *(1 for _ in kernel)), "alpha": ()}
    for role, (key, tensor) in entries.items():
        if not rank or (tensor.numel() != 1 if role == "alpha" else tensor.shape != shapes[role]):
            expected = f"shape {shapes[role]} for {name}"
            raise invalid(CheckpointError, path, expected, str(tuple(tensor.shape)), key=key)
        if not tensor.is_floating_point() and (role != "alpha" or tensor.is_complex()):
            raise invalid(CheckpointError, path, "floating-point values", str(tensor.dtype), key=key)
        if not is_finite(tensor):
            raise invalid(CheckpointError, path, "finite values", "NaN or infinity", key=key)
    if "alpha" in entries:
        return LoraLayer(down, up, entries["alpha"][1].item() / rank)
    alpha = config_alpha(name, config, path)
    divisor = math.sqrt(rank) if config.get("use_rslora") is True else rank
    return LoraLayer(down, up, 1.0 if alpha is None else alpha / divisor)


def config_alpha(name: str, config: Mapping[str, Any], path: Path) -> float | None:
    """Return the alpha of a layer by peft's config, None without one; patterns are names or the ends of names."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise invalid(CheckpointError, path, "a dictionary", describe(patterns), key="alpha_pattern")
    alpha = config.get("lora_alpha")
    for pattern, value in patterns.items():
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise invalid(CheckpointError, path, "names of layers", short_repr(pattern), key="alpha_pattern")
        if name == pattern.removeprefix("^") or name.endswith(f".{pattern}"):
            alpha = value
            break
    number = as_number(alpha)
    if alpha is not None and (number is None or not math.isfinite(number)):
        raise invalid(CheckpointError, path, "a finite number", short_repr(alpha), key="lora_alpha")
    return number


def write_lora(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    *,
    weight_name: str | None,
    safe_serialization: bool,
) -> None:
    """Write an adapter atomically, by default to `pytorch_lora_weights`, with peft's config as metadata."""
    check_type("safe_serialization", safe_serialization, bool)
    ending = ".safetensors" if safe_serialization else ".bin"
    name = check_type("weight_name", weight_name, str) or f"pytorch_lora_weights{ending}"
    if safe_serialization != name.endswith(".safetensors"):
        expected = f"a file name for safe_serialization={safe_serialization}, such as x{ending}"
        raise invalid(InputError, "weight_name", expected, short_repr(name))
    metadata = {CONFIG_KEY: json.dumps(config, indent=2, sort_keys=True, default=sorted)} if config else None
    tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}  # without torch.compile's
    write_tensors(folder / name, tensors, metadata=metadata)
