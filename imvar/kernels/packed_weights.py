"""Weight prepacking, as in oneDNN and IPEX: weights in the layout that a kernel prefers, kept while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class PackedWeights:
    """A cache of packed weights for a run of `calls` forward passes by one thread; a single pass keeps none.

    A weight that was replaced, or written to in place where autograd counts it, is packed again.
    """

    def __init__(self, calls: int = 1) -> None:
        self.calls = calls
        self.cache: dict[Any, tuple[Any, Tensor]] = {}

    def get(self, pack: Callable[..., Any], weight: Tensor, *args: Any) -> Any:
        """Return `pack(weight, *args)`; in a run of several passes, computed once."""
        if self.calls == 1:
            return pack(weight, *args)
        key = pack, args, id(weight), write_count(weight)
        if key not in self.cache:
            self.cache[key] = pack(weight, *args), weight  # keeps the weight alive, and with it its id
        return self.cache[key][0]


def write_count(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place; autograd does not count this for inference tensors: 0."""
    return 0 if tensor.is_inference() else tensor._version
