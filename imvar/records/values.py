"""Values of settings in records: as JSON represents them, and never a path."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from .digests import pixels_digest


def as_json(value: Any) -> Any:
    """Return a value as JSON represents it; text for what JSON cannot represent, a digest for text like a path."""
    if isinstance(value, str):
        is_like_path = {"/", "\\"} & set(value)
        return f"sha256:{hashlib.sha256(value.encode(errors='replace')).hexdigest()}" if is_like_path else value
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(as_json(key)): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    if isinstance(value, (Image, Tensor, np.ndarray)):
        return f"sha256:{pixels_digest(value)}"
    if isinstance(value, np.generic):
        return as_json(value.item())
    return f"a {type(value).__name__}"
