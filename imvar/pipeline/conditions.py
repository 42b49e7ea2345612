"""A call's own conditions: values by name that the stages of a subclass take as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from ..errors import InputError, InputTypeError, describe, invalid, short_repr


def conditions_by_stage(
    conditions: Any, stages: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]]
) -> dict[str, dict[str, Any]]:
    """Return the conditions that each stage takes, by the stage's name.

    `stages`: for each, the method in use and the method of the base class. A stage takes the conditions that its
    signature has beyond the base's parameters; with `**conditions`, all of them. Raises `InputError` for a condition
    that no stage takes, and for a missing one without a default.
    """
    given = {} if conditions is None else conditions
    if not isinstance(given, Mapping):
        raise invalid(InputTypeError, "conditions", "a dictionary of values by name", describe(given))
    added = {stage: added_parameters(*methods) for stage, methods in stages.items()}
    parameters = [p for of_stage in added.values() for p in of_stage]
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    takes_any = len(names) < len({p.name for p in parameters})
    required = {p.name for p in parameters if p.name in names and p.default is p.empty}
    if required - given.keys() or not (takes_any or given.keys() <= names):
        expected = f"the names {', '.join(map(repr, sorted(names)))}" if names else "none"
        hint = "" if names else "override unet_input, unet_kwargs or _encode_image with parameters of these names"
        raise invalid(InputError, "conditions", expected, short_repr([*given]), hint)
    return {
        stage: {name: given[name] for name in given if any(p.kind is p.VAR_KEYWORD or p.name == name for p in taken)}
        for stage, taken in added.items()
    }


def added_parameters(method: Callable[..., Any], base: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters of `method` beyond those of the method that it overrides."""
    position = len(signature(base).parameters)
    return [
        p
        for i, p in enumerate(signature(method).parameters.values())
        if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) or (p.kind is p.POSITIONAL_OR_KEYWORD and i >= position)
    ]
