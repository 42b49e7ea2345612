"""Write a full-size checkpoint with seeded random weights, from the published configs and tensor lists alone.

    python tests/support/published_checkpoint.py FOLDER [--seed 0] [--tiny] [--only .bin]

Every part is written as `.bin` and as safetensors, under the published file names: 11.6 GB in all, or 0.11 GB with
`--tiny`. No model code is used, neither imvar's nor third-party.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tiny_sizes import is_in_tiny, shrink_configs, tiny_shape

PUBLISHED = Path(__file__).resolve().parents[1] / "published"
FILES = {  # by part: tensor list, pickle, safetensors
    "vae": ("vae_legacy", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    "image_encoder": ("image_encoder", "pytorch_model.bin", "model.safetensors"),
    "unet": ("unet", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    "safety_checker": ("safety_checker", "pytorch_model.bin", "model.safetensors"),
}
ENDINGS = (".bin", ".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the published layout."""

    folder: Path

    @classmethod
    def at(cls, source: str, revision: str | None = None) -> Checkpoint:
        """Return a local folder, or a hub repository, whose configs and weights are downloaded."""
        patterns = ["*.json", "*.bin", "*.safetensors"]
        return cls(
            Path(source)
            if Path(source).is_dir()
            else Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns))
        )

    def settings(self, part: str) -> dict[str, Any]:
        """Return the content of a part's config.json."""
        return json.loads((self.folder / part / "config.json").read_text())

    def formats(self, part: str) -> list[dict[str, bool]]:
        """Return the loading options for each file format of a part, pickles first."""
        endings = {path.suffix for path in (self.folder / part).iterdir()}
        kinds = {".bin": {"use_safetensors": False}, ".safetensors": {"use_safetensors": True}}
        return [kind for ending, kind in kinds.items() if ending in endings]

    @property
    def latents(self) -> tuple[int, int, int]:
        """The shape of the latents of one image."""
        unet = self.settings("unet")
        return unet["in_channels"], unet["sample_size"], unet["sample_size"]

    @property
    def side(self) -> int:
        """The height and width of images, in pixels."""
        return self.latents[1] * 2 ** (len(self.settings("vae")["block_out_channels"]) - 1)


def key_list(name: str, tiny: bool = False) -> dict[str, tuple[list[int], torch.dtype]]:
    """Return the tensors of a published file: name to shape and dtype."""
    lines = (line.split("\t") for line in (PUBLISHED / "keys" / f"{name}.txt").read_text().splitlines())
    facts = {name: (json.loads(shape), getattr(torch, dtype)) for name, shape, dtype in lines}
    if not tiny:
        return facts
    part = name.removesuffix("_legacy")
    return {name: (tiny_shape(part, shape), dtype) for name, (shape, dtype) in facts.items() if is_in_tiny(name)}


def draw(name: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw values that preserve the variance of activations: N(0, 1/fan_in), small biases, scales around 1.

    They are drawn on the device of the generator; a seed's values are not the same on every device.
    """
    if not dtype.is_floating_point:
        return torch.arange(shape[-1], dtype=dtype).expand(shape).contiguous()  # position_ids
    noise = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
    if len(shape) > 1:
        return noise.mul_(noise[0].numel() ** -0.5)
    if name.endswith("_embeds_weights"):  # the cosines of random embeddings in 768 dimensions are N(0, 0.036)
        return noise.mul_(0.01).add_(0.13)
    is_scale = "norm" in name and name.endswith("weight")
    return noise.mul_(0.1).add_(1.0 if is_scale else 0.0)


def tiny_folder(folder: Path) -> None:
    """Write the v2.0 configs with tiny sizes, without weights, into `folder`, which is created if needed."""
    shutil.copytree(PUBLISHED / "v2.0", folder, dirs_exist_ok=True)
    shrink_configs(folder)


def write_checkpoint(
    folder: Path,
    seed: int = 0,
    tiny: bool = False,
    endings: Sequence[str] = ENDINGS,
    device: torch.device | str = "cpu",
) -> None:
    """Write the v2.0 configs and random weights into `folder`, which is created if needed."""
    if tiny:
        tiny_folder(folder)
    else:
        shutil.copytree(PUBLISHED / "v2.0", folder, dirs_exist_ok=True)
    for i, (part, (keys, pickled, safe)) in enumerate(FILES.items()):
        generator = torch.Generator(device).manual_seed(seed + i)
        tensors = {name: draw(name, *facts, generator).cpu() for name, facts in key_list(keys, tiny).items()}
        if ".bin" in endings:
            torch.save(tensors, folder / part / pickled)
        if ".safetensors" in endings:
            save_file(tensors, folder / part / safe, metadata={"format": "pt"})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="shrink every part to about a hundredth")
    parser.add_argument("--only", choices=ENDINGS, help="write one file format")
    args = parser.parse_args()
    write_checkpoint(args.folder, args.seed, args.tiny, [args.only] if args.only else ENDINGS)
    size = "tiny" if args.tiny else "at full size"
    print(f"{args.folder}: the published layout, {size}, with random weights, seed {args.seed}")


if __name__ == "__main__":
    main()
