"""Make an image again from its record: the pipeline, the process and the call as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import schedulers
from ..embeddings import augment, join_embeds, mix, slerp
from ..errors import InputError, invalid, short_repr
from ..pipeline import StableDiffusionImageVariationPipeline
from ..records.digests import pixels_digest
from ..records.record import differences
from ..records.remaking import OPTIONS, text_of_input
from ..sources import OPERATIONS
from .sources import InputImage, read_source

Record = dict[str, Any]
Part = tuple[dict[str, Any], InputImage]
"""An entry of a record's inputs, and its file."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
SETTINGS = {
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "eta",
    "guidance_interval",
    "cache_interval",
    "guidance_rescale",
    "strength",
    "paste",
    "on_flagged",
}
"""Arguments of a call that a record's settings may set."""
COMPILE_OPTIONS = {"mode": (str,), "dynamic": (bool,), "fullgraph": (bool,)}
EAGER_GRAPHS = {"backend": "cudagraphs"}  # no other backend is set again: it may be code of its own
ROUNDING = ("versions.", "machine.", "call.", *(f"pipeline.{name}" for name in ("attention_", "vae_slicing")))
ROUNDING += ("pipeline.channels_last", "pipeline.offload", "pipeline.compiled")
"""What differences between records begin with that change no more than rounding."""
UNIMPORTANT = ("checkpoint.name", "checkpoint.revision", "checkpoint.commit")
"""Differences that change nothing where the weights are equal."""


def read_inputs(option: str, paths: Sequence[Path | None]) -> list[InputImage]:
    """Return the photos or embeddings in the files of an option."""
    return [read_source(path, option) for path in paths if path]


def match_inputs(record: Record, files: Mapping[str, Sequence[InputImage]]) -> list[InputImage]:
    """Return the file for each input of a record: that whose pixels are equal, in any order and of any name.

    `files`: those that were given, by option. Raises `InputError` if one is missing, differs, or is not used.
    """
    digests = {
        id(file): pixels_digest(file.photo() if file.embeds is None else file.embeds)
        for given in files.values()
        for file in given
    }
    matched = []
    for entry in record["inputs"]:
        option = OPTIONS[entry["role"]]
        given = files.get(option, [])
        found = [file for file in given if digests[id(file)] == entry["pixels"]]
        if not found:
            got = ", ".join(f"{file.path}, pixels {digests[id(file)][:12]}" for file in given) or "none"
            raise invalid(InputError, option, text_of_input(entry), got)
        matched.append(found[0])
    for option, given in files.items():
        for file in given:
            if not any(file is match for match in matched):
                raise invalid(InputError, option, "files that the image was made from", str(file.path))
    return matched


def load_recorded(record: Record, checkpoint: str, device: torch.device) -> Any:
    """Return the pipeline with the dtypes, the scheduler and the switches of a record."""
    entry, switches = record["checkpoint"], record["pipeline"]
    dtypes: dict[str, Any] = {name: dtype_named(text) for name, text in record["machine"]["dtype"].items()}
    without = [name for name, part in (switches.get("components") or {}).items() if part is None]
    options: dict[str, Any] = {"dtype": dtypes} | dict.fromkeys(set(without) & {"safety_checker", "feature_extractor"})
    options["requires_safety_checker"] = "safety_checker" not in without
    if Path(checkpoint).is_file():
        ema = {True: "yes", False: "no"}.get(entry.get("ema"), "auto")
        pipe: Any = StableDiffusionImageVariationPipeline.from_single_file(checkpoint, ema=ema, **options)
    else:
        is_local = Path(checkpoint).exists()
        revision = None if is_local else entry.get("commit") or entry["revision"]
        pipe = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint, revision=revision, **options)
    set_scheduler_as_recorded(pipe, record["scheduler"])
    pipe.to(device)
    set_switches(pipe, switches, device)
    return pipe


def dtype_named(text: str) -> torch.dtype:
    """Return the dtype of a name."""
    if text not in DTYPES:
        raise invalid(InputError, "dtype", f"one of {', '.join(DTYPES)}", short_repr(text))
    return DTYPES[text]


def set_scheduler_as_recorded(pipe: Any, entry: Mapping[str, Any]) -> None:
    """Replace the scheduler by the recorded one."""
    name = entry["class"]
    if name not in schedulers.__all__ or not name.endswith("Scheduler"):
        raise invalid(InputError, "scheduler", "one of imvar's schedulers", short_repr(name))
    pipe.scheduler = getattr(schedulers, name).from_config(dict(entry["config"]))


def set_switches(pipe: Any, switches: Mapping[str, Any], device: torch.device) -> None:
    """Set the switches of the pipeline, except those for other devices."""
    if switches.get("vae_slicing"):
        pipe.enable_vae_slicing()
    if tiles := switches.get("vae_tiling"):
        pipe.enable_vae_tiling()
        for name in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
            if isinstance(value := tiles.get(name), (int, float)) and value > 0:
                setattr(pipe.vae, name, value)
    if freeu := switches.get("freeu"):
        pipe.enable_freeu(**{name: freeu.get(name) for name in ("s1", "s2", "b1", "b2")})
    if isinstance(size := (switches.get("attention_slicing") or {}).get("unet"), int):
        pipe.enable_attention_slicing(size)
    for name in switches.get("channels_last") or []:
        if name in pipe.modules:
            pipe.modules[name].to(memory_format=torch.channels_last)
    if switches.get("fp8"):
        pipe.enable_fp8()
    if switches.get("int8"):
        pipe.enable_int8()
    if isinstance(options := switches.get("compiled"), dict):
        allowed = {k: v for k, v in options.items() if isinstance(v, COMPILE_OPTIONS.get(k, ()))}
        pipe.compile(**(EAGER_GRAPHS if EAGER_GRAPHS.items() <= options.items() else allowed))
    if switches.get("offload") == device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)


@contextmanager
def process_as_recorded(machine: Mapping[str, Any]) -> Iterator[None]:
    """Use the recorded threads and settings of PyTorch in the block."""
    flags: Any = machine["flags"] if isinstance(machine.get("flags"), dict) else {}
    with ExitStack() as restore:

        def use(name: str, value: Any, get: Any, set_: Any, choices: Sequence[Any]) -> None:
            if value in choices and value != (present := get()):
                restore.callback(set_, present)
                set_(value)

        use("threads", machine["threads"], torch.get_num_threads, torch.set_num_threads, range(1, 1025))
        precision = flags.get("float32_matmul_precision")
        use(
            "precision",
            precision,
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            ("highest", "high", "medium"),
        )
        deterministic = torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
        use("deterministic", flags.get("deterministic"), *deterministic, (True, False))
        yield


def recorded_call(record: Record, inputs: Sequence[InputImage], pipe: Any, alone: bool) -> dict[str, Any]:
    """Return the arguments of a call of the recorded shape, which has the image in the recorded row.

    The photo and the seed are those of all its rows, as no row depends on what the others show. `alone`: of one row.
    """
    by_role: dict[str, list[Part]] = {}
    for entry, file in zip(record["inputs"], inputs, strict=True):
        by_role.setdefault(entry["role"], []).append((entry, file))
    call = record["call"]
    images, rows = (1, 1) if alone else (call["images"], call["rows"])
    arguments = {name: value for name, value in record["settings"].items() if name in SETTINGS and value is not None}
    if isinstance(scales := arguments.get("guidance_scale"), list):  # of a function, by step
        arguments["guidance_scale"] = partial(scale_at, scales)
    arguments |= {"num_images_per_prompt": rows // images, "seed": [record["seed"]] * rows}
    main = [part for role, parts in by_role.items() if role in ("image", "image_embeds") for part in parts]
    if main and not main[0][1].is_embedding and not main[0][0].keys() & {*OPERATIONS, "preprocess"}:
        arguments["image"] = [main[0][1].photo()] * images
    elif main:
        arguments["image_embeds"] = join_embeds([embedding_of(main, pipe)] * images)
    if negative := by_role.get("negative"):
        arguments["negative_image_embeds"] = embedding_of(negative, pipe)
    for role, name in {"init": "init_image", "mask": "mask_image"}.items():
        if role in by_role:
            arguments[name] = by_role[role][0][1].photo()
    return arguments


def embedding_of(parts: Sequence[Part], pipe: Any) -> Tensor:
    """Return the embedding of an image, or of several combined as their entries say."""
    embeds = []
    for entry, file in parts:
        photo = {} if file.is_embedding else {"preprocess": entry.get("preprocess", "clip")}
        embeds.append(pipe.encode_image(file.photo(), **photo) if photo else file.embed(pipe).to(pipe.device))
    how, operations = parts[0][0], [entry.keys() & OPERATIONS for entry, _ in parts]
    if all(names == {"weight"} for names in operations):
        return mix([(part, entry["weight"]) for part, (entry, _) in zip(embeds, parts, strict=True)])
    if len(parts) == 2 and all(names == {"slerp"} for names in operations):
        return slerp(embeds[0], embeds[1], how["slerp"])
    if len(parts) == 1 and operations[0] == {"augment"} and isinstance(how["augment"], list):
        return augment(embeds[0], how["augment"][0], how["augment"][1:])
    if len(parts) == 1 and not operations[0]:
        return embeds[0]
    raise invalid(InputError, "inputs", "a mixture or an interpolation of photos", short_repr([e for e, _ in parts]))


def scale_at(scales: Sequence[float], fraction: float) -> float:
    """Return the guidance scale of a step by the fraction of the steps done."""
    return scales[round(fraction * len(scales))]


def compare_records(recorded: Record, present: Record) -> list[str]:
    """Return the differences that make the image equal only up to rounding. Raises `InputError` for others."""
    weights, here = recorded["checkpoint"]["weights"], present["checkpoint"]["weights"]
    if weights != here:
        raise invalid(InputError, "--checkpoint", f"weights with the digest {weights}", str(here))
    found = [line for line in differences(recorded, present) if not line.startswith(UNIMPORTANT)]
    serious = [line for line in found if not line.startswith(ROUNDING)]
    if serious:
        raise invalid(InputError, "record", "a pipeline and a call that can be made here", "; ".join(serious))
    others = [line for line in found if not line.startswith("call.")]
    return others + (["made alone, not in its batch"] if len(others) < len(found) else [])
