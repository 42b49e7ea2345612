"""Settings: what a `config.json` says, frozen, read by attribute or by key.

A part (model, scheduler, image processor) declares its settings as a frozen dataclass derived from
`Config`, whose fields carry the names, order and defaults of the published format. A config also
remembers which fields were given and which keys it did not know (`extra_fields`), so that settings pass
from one scheduler to another, and back to disk, without loss.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Number
from types import MappingProxyType, NoneType, UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from .checks import is_bool
from .errors import InputError, InputTypeError, short_repr


def one_of(default: Any, *others: Any) -> Any:
    """A field with a default and the only other values that the part can honour."""
    return field(default=default, metadata={"allowed": (default, *others)})


def fixed(default: Any) -> Any:
    """A field that the format has and every published checkpoint leaves at this one value.

    Where that asks for nothing (None, False, 0), other ways to say so are taken as well, also once per level.
    """
    ways = () if default else (None, False, 0)
    return field(default=default, metadata={"allowed": (default, *ways), "per_level": True})


# What a field's annotation lets it hold

MAX_LIST_LENGTH = 10_000  # entries of a list
INVALID = object()
WORDS = {
    bool: "True or False",
    int: "a whole number below 2^31",
    float: "a finite number",
    str: "a string",
    NoneType: "None",
}


def coerce(value: Any, kind: Any) -> Any:
    """`value` as a field of this type holds it, or UNFIT; numbers of numpy and torch become Python's."""
    if kind in (bool, str, NoneType):
        return value if isinstance(value, kind) else INVALID
    if kind in (int, float):
        return coerce_number(value, kind)
    origin, of = get_origin(kind), get_args(kind)
    if origin is Sequence:
        return coerce_list(value, of[0])
    if origin is Mapping:
        return value if isinstance(value, Mapping) else INVALID
    if origin in (UnionType, Union):
        return next((fit for one in of if (fit := coerce(value, one)) is not INVALID), INVALID)
    return value if kind is Any or not isinstance(kind, type) or isinstance(value, kind) else INVALID


def coerce_number(value: Any, kind: type) -> Any:
    """A whole number below 2^31, or any finite one."""
    if is_bool(value) or isinstance(value, (str, bytes, bytearray)):
        return INVALID
    try:
        found = operator.index(value) if kind is int or type(value) is int else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return INVALID
    return found if (math.isfinite(found) if type(found) is float else abs(found) < 2**31) else INVALID


def coerce_list(value: Any, kind: Any) -> Any:
    """A list or tuple whose every entry fits, itself if it is in order; other sequences and arrays as a list."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) > MAX_LIST_LENGTH:
        return INVALID
    entries = [coerce(entry, kind) for entry in value]
    if any(entry is INVALID for entry in entries):
        return INVALID
    same = isinstance(value, (list, tuple)) and all(map(operator.is_, entries, value))
    return value if same else tuple(entries) if isinstance(value, tuple) else entries


def describe_type(kind: Any) -> str:
    """In words, what a field of this type can hold."""
    if get_origin(kind) is Sequence:
        return f"a list, for each entry {describe_type(get_args(kind)[0])}"
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(map(describe_type, get_args(kind)))
    return WORDS.get(kind) or getattr(get_origin(kind) or kind, "__name__", str(kind))


@functools.cache
def field_types(cls: type[Config]) -> Mapping[str, Any]:
    """The type of each field; of none where a fork's annotations name what only its own function knows."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


DEFAULTS = "_use_default_values"  # diffusers' key for the fields that were not given


@dataclass(frozen=True, eq=False, repr=False)
class Config(dict[str, Any]):
    """The settings of one part, a dictionary that cannot be changed and is read by attribute as well.

    `fields_set` names the fields that were, `extra_fields` holds the keys that no field is for. As in diffusers, the key
    `_use_default_values` lists the fields that were not given. Raises `InputError` for a value that the part
    cannot honour.
    """

    fields_set: ClassVar[frozenset[str]] = frozenset()
    extra_fields: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @classmethod
    def from_args(cls, *args: Any, **settings: Any) -> Self:
        """From constructor arguments; an unknown keyword is a `TypeError`."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise InputTypeError(f"{cls.__name__}: unexpected argument {unknown[0]!r}; it takes {', '.join(known)}")
        if len(args) > len(known):
            raise InputTypeError(f"{cls.__name__}: {len(args)} arguments came; it takes {', '.join(known)}")
        if twice := set(settings) & set(known[: len(args)]):
            raise InputTypeError(f"{cls.__name__}: {sorted(twice)[0]!r} came both by position and by name")
        return cls.from_dict({**dict(zip(known, args, strict=False)), **settings})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **changes: Any) -> Self:
        """From a mapping such as a `config.json` or another part's config.

        Values that were only defaults over there are left to this class's own defaults; keys this
        class does not know are kept in `extra_fields`.
        """
        defaults = coerce(settings.get(DEFAULTS, ()), Sequence[str])
        if defaults is INVALID:
            raise InputTypeError(
                f"{cls.__name__}: {DEFAULTS}={short_repr(settings[DEFAULTS])} is not supported; it can be "
                "a list of settings",
                key=DEFAULTS,
            )
        defaults = frozenset(defaults)
        values = {key: value for key, value in settings.items() if key not in defaults} | changes
        known = {f.name for f in fields(cls)} & values.keys()
        config = cls(**{name: values[name] for name in known})
        ours = known | {"_class_name", DEFAULTS}
        return config.record_fields(known, {key: value for key, value in values.items() if key not in ours})

    def record_fields(self, fields_set: Iterable[str], extra_fields: Mapping[str, Any]) -> Self:
        """This config, told once which fields were given, and what came beside them."""
        vars(self).update(fields_set=frozenset(fields_set), extra_fields=MappingProxyType(dict(extra_fields)))
        names = [f.name for f in fields(self)]
        dict.update(
            self,
            extra_fields,
            **{name: getattr(self, name) for name in names},
            **{DEFAULTS: [name for name in names if name not in self.fields_set]},
        )
        return self

    def __post_init__(self) -> None:
        for f in fields(self):
            value, allowed, kind = (
                getattr(self, f.name),
                f.metadata.get("allowed"),
                field_types(type(self)).get(f.name, Any),
            )
            if allowed:
                per_level = f.metadata.get("per_level") and isinstance(value, (list, tuple)) and value
                fit = value if all(is_one_of(one, allowed) for one in (value if per_level else [value])) else INVALID
            else:
                fit = coerce(value, kind)
            if fit is INVALID:
                error = InputError if allowed or isinstance(value, Number) else InputTypeError
                raise error(
                    f"{type(self).__name__}: {f.name}={short_repr(value)} is not supported; it can be "
                    + (" or ".join(dict.fromkeys(map(repr, allowed))) if allowed else describe_type(kind)),
                    key=f.name,
                )
            object.__setattr__(self, f.name, fit)
        self.check()
        self.record_fields((f.name for f in fields(self) if getattr(self, f.name) is not f.default), {})

    def check(self) -> None:
        """Raise `InputError` for values that do not go together; a subclass may put a field in order as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.extra_fields[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no setting {name!r}") from None

    def _frozen(self, *_: Any, **__: Any) -> Any:
        raise InputTypeError(f"{type(self).__name__} cannot be changed; its part's register_to_config makes another")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _frozen  # type: ignore

    def __reduce__(self):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _restore, (type(self), values, self.fields_set, dict(self.extra_fields))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested configs included, ready for JSON."""
        return {key: to_jsonable(value) for key, value in self.items() if key != DEFAULTS}

    def explicit(self) -> dict[str, Any]:
        """Only what was given, foreign keys included: what carries over to another class."""
        return {key: value for key, value in self.items() if key in self.fields_set or key in self.extra_fields}

    def to_json_string(self) -> str:
        """The text of a `config.json`: keys sorted, two spaces, a newline at the end."""
        return json_text(self.to_dict())


def json_text(settings: Mapping[str, Any]) -> str:
    """The text of a settings file. Raises `InputError` for a value that JSON has no way to write, NaN among them."""
    try:
        return json.dumps(settings, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        bad = next((name for name, value in settings.items() if not is_json_serializable(name, value)), "config")
        raise InputError(
            f"{bad}={short_repr(settings.get(bad))}: cannot be written as JSON ({error})", key=str(bad)
        ) from error


def is_json_serializable(name: Any, value: Any) -> bool:
    try:
        json.dumps({name: value}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(name, str)


def is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """Whether a plain value is among these; True is not 1 here."""
    return (value is None or isinstance(value, (str, Number))) and any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
    )


def _restore(cls: type[Config], values: dict[str, Any], fields_set: frozenset[str], extra: dict[str, Any]) -> Config:
    return cls(**values).record_fields(fields_set, extra)


def to_jsonable(value: Any) -> Any:
    """Configs to dictionaries, tuples and arrays to lists: what JSON can hold."""
    if isinstance(value, Mapping):
        return value.to_dict() if isinstance(value, Config) else {key: to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


class Configured:
    """A part that is made from settings: by keyword, by position, or from a whole `Config`."""

    config_class: ClassVar[type[Config]]
    config: Any  # a `config_class`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_class" in cls.__dict__:  # so that help() and editors list the settings
            cls.__signature__ = inspect.signature(cls.config_class)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **settings: Any):
        super().__init__()
        if "config" in settings and not args:
            args = (settings.pop("config"),)
            if as_settings(args[0]) is None:
                raise InputTypeError(f"config={short_repr(args[0])}: a config or a dictionary would do", key="config")
        if len(args) == 1 and not settings and (given := as_settings(args[0])) is not None:
            self.config = given if isinstance(given, self.config_class) else self.config_class.from_dict(given)
        else:
            self.config = self.config_class.from_args(*args, **settings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """A part with these settings (and random weights, if it has any); `changes` come on top.

        Changes that this class has no setting for are left out, with a warning.
        """
        settings = as_settings(config)
        known = {f.name for f in fields(cls.config_class)}
        if unknown := sorted(changes.keys() - known):
            warnings.warn(
                f"{cls.__name__}.from_config: {', '.join(unknown)}: no such setting, so it changes nothing",
                stacklevel=2,
            )
            changes = {name: value for name, value in changes.items() if name in known}
        if settings is None:
            raise InputTypeError(f"config: {type(config).__name__} came; a config or a dictionary would do")
        named = [name for name in settings if str(name)[:1] != "_"]
        if named and not known & set(named):
            raise InputError(
                f"config: {short_repr(named)} came, none of which is a setting of {cls.__name__}", key="config"
            )
        return cls(cls.config_class.from_dict(settings, **changes))

    def register_to_config(self, **changes: Any) -> None:
        """Write changed settings into `config`, as a fork does that has changed a loaded part."""
        self.config = self.config_class.from_dict(self.config, **changes)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.config.to_json_string().rstrip()}"


def as_settings(value: Any) -> Mapping[str, Any] | None:
    """A config of ours, a dictionary, or a config object of another library, as a mapping; else None."""
    if isinstance(value, Mapping):
        return value
    return value.to_dict() if callable(getattr(value, "to_dict", None)) and not isinstance(value, type) else None
