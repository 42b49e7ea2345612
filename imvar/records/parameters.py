"""The line of `parameters` that AUTOMATIC1111's web UI writes into images, which many programs show and parse.

Before it is the prompt, here an empty line. Values with a comma, a colon or a line break are JSON strings.
"""

from __future__ import annotations

import json
import re
from typing import Any

SAMPLERS = {  # the web UI's names of them
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
}
N_HASH = 10  # characters of a digest


def parameters_of(record: dict[str, Any]) -> str:
    """Return an empty prompt and the line of settings."""
    settings, scheduler, checkpoint = record["settings"], record["scheduler"], record["checkpoint"]
    weights = checkpoint["weights"] or ""
    photos = [entry["name"] for entry in record["inputs"] if entry["role"] == "image" and entry["name"]]
    height, width = settings.get("height"), settings.get("width")
    has_start = any(entry["role"] == "init" for entry in record["inputs"])
    values = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": SAMPLERS.get(scheduler["class"], scheduler["class"]),
        "Schedule type": "Karras" if scheduler["config"].get("use_karras_sigmas") else None,
        "CFG scale": settings.get("guidance_scale"),
        "Seed": record["seed"],
        "Size": f"{width}x{height}" if height and width else None,
        "Model hash": weights.removeprefix("sha256:")[:N_HASH] if weights.startswith("sha256:") else None,
        "Model": checkpoint["name"],
        "Denoising strength": settings.get("strength") if has_start else None,
        "Variation of": " + ".join(dict.fromkeys(photos)) or None,
        "Version": f"imvar {record['versions'].get('imvar', '')}".strip(),
    }
    return "\n" + ", ".join(f"{name}: {quote(value)}" for name, value in values.items() if value is not None)


def quote(value: Any) -> str:
    """Return a value as the line has it."""
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    text = re.sub(r"[\ud800-\udfff]", "?", text)  # half characters, from names that are not UTF-8
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n\r"]', text) else text
