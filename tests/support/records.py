"""A record made by hand."""

import copy
from typing import Any

RECORD: dict[str, Any] = {
    "format": 1,
    "versions": {"imvar": "0.1.0", "torch": "2.13.0+cpu", "Pillow": "13.0.0", "numpy": "2.4.6", "python": "3.11.7"},
    "checkpoint": {"name": "imvar-emoji", "revision": None, "weights": "sha256:" + "0123456789abcdef" * 4},
    "seed": 7,
    "settings": {
        "height": 64,
        "width": 96,
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "guidance_interval": [0.0, 1.0],
        "on_flagged": "black",
    },
    "scheduler": {"class": "DDIMScheduler", "config": {"clip_sample": False, "steps_offset": 1}},
    "pipeline": {"vae_slicing": True},
    "machine": {"device": "cpu", "device_name": "a CPU", "dtype": {"unet": "float32"}, "threads": 1, "flags": {}},
    "inputs": [{"role": "image", "name": "a fox, red: лиса.png", "sha256": "1" * 64, "pixels": "2" * 64}],
    "call": {"rows": 4, "row": 2, "images": 1, "image": 0},
    "exact": True,
    "reasons": [],
}


def hand_made(**changes: Any) -> dict[str, Any]:
    """Return a copy of `RECORD` with other entries; `checkpoint__name` is `record["checkpoint"]["name"]`."""
    record = copy.deepcopy(RECORD)
    for name, value in changes.items():
        *outer, last = name.split("__")
        entry: Any = record
        for key in outer:
            entry = entry[key]
        entry[last] = value
    return record
