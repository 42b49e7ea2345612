"""The model card of an exported checkpoint, and the licences that must accompany it."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

LICENCES = ("NOTICE*", "LICENSE*", "LICENCE*", "COPYING*")
TRAINED = {
    "lora": "an adapter of its attention layers, which is merged into them,",
    "cross-attention": "its cross-attention layers",
    "unet": "its whole UNet",
}
CARD = """---
{licence}library_name: imvar
pipeline_tag: image-to-image
tags: [image-variation, stable-diffusion]
---

# {name}, fine-tuned

`{name}` after a fine-tuning: `scripts/finetune.py` of imvar trained {trained} for {steps} steps{images}.
All other weights are unchanged. `training.json` has the settings.

```python
from imvar import StableDiffusionImageVariationPipeline  # or diffusers' class of that name

pipe = StableDiffusionImageVariationPipeline.from_pretrained("{folder}")
```

## Licence

The licence of `{name}` applies to these weights{notices}.
"""


def copied_notices(pipe: Any) -> list[Path]:
    """Return the files with the licence of a checkpoint, beside the folder of its UNet."""
    folder = folder_of(pipe)
    files = sorted(folder.iterdir()) if folder else []
    return [file for file in files if any(fnmatch.fnmatch(file.name.upper(), name) for name in LICENCES)]


def folder_of(pipe: Any) -> Path | None:
    """Return the folder of a checkpoint; None for one that is a single file."""
    part = Path(pipe.unet._origin.files[0].path).parent
    return part.parent if part.name == "unet" else None


def model_card(record: dict[str, Any], notices: list[Path]) -> str:
    """Return the text of README.md for an exported folder."""
    has_link = "license: other\nlicense_link: " + notices[0].name + "\n" if notices else ""
    return CARD.format(
        licence=has_link,
        name=record["checkpoint"]["name"],
        steps=record["step"],
        trained=TRAINED[record["stage"]],
        images=f" on {record['images']} images" if "images" in record else "",
        folder="checkpoint",
        notices=f", with {', '.join(file.name for file in notices)} beside this file" if notices else "",
    )
