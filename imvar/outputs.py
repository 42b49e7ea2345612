"""Output classes: fields are read by attribute, by key or by index, or unpacked with `to_tuple()`.

As in diffusers and transformers, all but attribute access skip fields that are None. They also skip the fields that
imvar adds (`attribute_only`), so that code that unpacks the outputs of diffusers keeps working.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils._pytree import register_pytree_node

from .errors import InputTypeError, invalid

if TYPE_CHECKING:
    from torch import Tensor


class Output(dict[str, Any]):
    """Base of all outputs; subclasses are dataclasses.

    An output is a dictionary, which torch.jit.trace requires, and a pytree, for torch.export and torch.func.
    `type(output)(mapping)`, from a mapping or pairs of field names and values, is how accelerate and DataParallel
    rebuild one.
    """

    attribute_only: ClassVar[tuple[str, ...]] = ()  # rather than metadata, which torch.compile cannot read

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = f"{cls.__module__}.{cls.__qualname__}"
        register_pytree_node(cls, cls._flatten, partial(unflatten, cls), serialized_type_name=name)

    def __class_getitem__(cls, item: Any) -> Any:
        """Return this class: its parameters are for type checkers alone, so that no output stores them."""
        return cls

    def __post_init__(self) -> None:
        first = fields(self)[0].name  # type: ignore[arg-type]
        if isinstance(values := getattr(self, first), (Mapping, Iterator)):
            setattr(self, first, None)
            for name, value in dict(values).items():
                setattr(self, name, value)

    def _flatten(self) -> tuple[list[Any], list[str]]:
        present = {name: value for name, value in vars(self).items() if value is not None}
        return list(present.values()), list(present)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in self.attribute_only:
            super().pop(name, None) if value is None else super().__setitem__(name, value)

    def _refuse_change(self, *_: Any, **__: Any) -> Any:
        raise invalid(InputTypeError, type(self).__name__, "output.field = value", "another change of a field")

    if not TYPE_CHECKING:  # which would take the type of the whole class for uncertain
        pop = popitem = update = setdefault = clear = __delitem__ = __ior__ = _refuse_change

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in the order of the fields."""
        return tuple(self.values())


def unflatten(cls: type[Output], values: Any, names: list[str]) -> Any:
    """Return an output with these fields, and None for the others."""
    output = cls.__new__(cls)
    for f in fields(cls):  # type: ignore[arg-type]
        setattr(output, f.name, None)
    for name, value in zip(names, values, strict=True):
        setattr(output, name, value)
    return output


@dataclass(eq=False)
class UNet2DConditionOutput(Output):
    """`sample`: (b, c, h, w), the prediction for the noisy latents: noise or velocity."""

    sample: Tensor


@dataclass(eq=False)
class DecoderOutput(Output):
    """`sample`: (b, 3, 8h, 8w), images with values around [-1, 1]."""

    sample: Tensor


@dataclass(eq=False)
class AutoencoderKLOutput(Output):
    """`latent_dist`: the Gaussian posterior over the latents of each image."""

    latent_dist: Any


@dataclass(eq=False)
class CLIPVisionModelOutput(Output):
    """`image_embeds`: (b, projection), not normalized; `last_hidden_state`: (b, 1 + patches, width).

    `hidden_states`: those of the embedding and of every layer, if requested.
    """

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class BaseModelOutput(Output):
    """`last_hidden_state`: (b, n, c). `hidden_states`: the input of every layer and the last output, on request."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class BaseModelOutputWithPooling(Output):
    """`last_hidden_state`: (b, n, c); `pooler_output`: (b, c). `hidden_states` as in `BaseModelOutput`."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class Transformer2DModelOutput(Output):
    """`sample`: (b, c, h, w)."""

    sample: Tensor


@dataclass(eq=False)
class SchedulerOutput(Output):
    """`prev_sample`: (b, c, h, w), the latents of the next, less noisy timestep."""

    prev_sample: Tensor


@dataclass(eq=False)
class DenoisedOutput(SchedulerOutput):
    """`pred_original_sample`: (b, c, h, w), the predicted clean latents."""

    pred_original_sample: Tensor | None = None
