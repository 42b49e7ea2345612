"""Configs: the content of a `config.json` as a frozen dataclass that is read by attribute or by key.

A model, scheduler or image processor declares its fields in a subclass of `Config`, with the names, order and defaults
of the published format. A config also records which fields were set and which keys have no field (`extra_fields`), so
that nothing is lost on the way from one scheduler to another or back to disk.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Number
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints
from weakref import ref

from .checks import MAX_FLOAT, TYPE_NAMES, as_number
from .errors import InputError, InputTypeError, describe, invalid, short_repr, warn_user


def one_of(default: Any, *others: Any) -> Any:
    """Return a field that accepts its default and these other values only."""
    return field(default=default, metadata={"allowed": (default, *others)})


def fixed(default: Any) -> Any:
    """Return a field of the format that has the same value in every published checkpoint, and accepts no other.

    If that value switches something off (None, False, 0), its equivalents and lists of them, one per block, are
    accepted too.
    """
    equivalents = () if default else (None, False, 0)
    return field(default=default, metadata={"allowed": (default, *equivalents), "per_block": True})


# Coercion of values to the type of their field

MAX_LIST_LENGTH = 10_000
INVALID = object()
FIELD_TYPE_NAMES = TYPE_NAMES | {int: "an integer below 2^31", float: "a finite number"}


def coerce(value: Any, kind: Any) -> Any:
    """Return `value` as a field of type `kind` stores it, or INVALID; numbers of NumPy and PyTorch become Python's."""
    if kind in (int, float):
        return coerce_number(value, kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Sequence:
        return coerce_list(value, args[0])
    if origin is Mapping:
        return value if isinstance(value, Mapping) else INVALID
    if origin in (UnionType, Union):
        return next((result for arg in args if (result := coerce(value, arg)) is not INVALID), INVALID)
    return value if kind is Any or not isinstance(kind, type) or isinstance(value, kind) else INVALID


def coerce_number(value: Any, kind: type) -> Any:
    """Return an integer below 2^31 or, if `kind` is float, any finite number; else INVALID."""
    number = as_number(value, operator.index if kind is int or type(value) is int else float)
    limit = MAX_FLOAT if type(number) is float else 2**31 - 1
    return number if number is not None and abs(number) <= limit else INVALID


def coerce_list(value: Any, kind: Any) -> Any:
    """Return a sequence whose entries are coerced to `kind`, the same object if no entry changes; else INVALID."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) > MAX_LIST_LENGTH:
        return INVALID
    entries = [coerce(entry, kind) for entry in value]
    if any(entry is INVALID for entry in entries):
        return INVALID
    unchanged = isinstance(value, (list, tuple)) and all(map(operator.is_, entries, value))
    return value if unchanged else tuple(entries) if isinstance(value, tuple) else entries


def describe_type(kind: Any) -> str:
    """Return in words which values a field of type `kind` accepts."""
    if get_origin(kind) is Sequence:
        return f"a list with {describe_type(get_args(kind)[0])} per entry"
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(map(describe_type, get_args(kind)))
    return FIELD_TYPE_NAMES.get(kind) or getattr(get_origin(kind) or kind, "__name__", str(kind))


@functools.cache
def field_types(cls: type[Config]) -> Mapping[str, Any]:
    """Return the type of each field; none if a subclass's annotations name local classes of a function."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


DEFAULTS = "_use_default_values"  # diffusers' key for the fields that were not set


class InheritedSetattr(type):
    """Metaclass whose classes inherit `__setattr__` and `__delattr__`, which `@dataclass(frozen=True)` would replace.

    The subclasses of a frozen dataclass are frozen too; `config.field = value` registers the value nevertheless.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        if name not in ("__setattr__", "__delattr__"):
            super().__setattr__(name, value)


class OwnedDict(dict[str, Any], metaclass=InheritedSetattr):
    """A dictionary whose items change only through `register_to_config` of its owner, of which it is the config."""

    _owner: Any = staticmethod(lambda: None)  # a weak reference to the component

    def owned_by(self, owner: Any) -> Self:
        """Return a copy whose changes are those of this owner."""
        config = type(self).__new__(type(self))
        dict.update(config, self)
        vars(config).update(vars(self), _owner=ref(owner))
        return config

    def _frozen(self, *_: Any, **__: Any) -> Any:
        hint = "call register_to_config of its model, scheduler or processor, or change dict(config)"
        raise invalid(InputTypeError, type(self).__name__, "only read access to a config", "a change", hint)

    def __setitem__(self, key: str, value: Any) -> None:
        owner = self._owner() or self._frozen()
        owner.register_to_config(**{key: value})
        dict.clear(self)
        dict.update(self, owner.config)
        vars(self).update(vars(owner.config))

    if not TYPE_CHECKING:  # which would take the type of the whole class for uncertain
        __setattr__ = __setitem__
        __delattr__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _frozen


@dataclass(frozen=True, eq=False, repr=False)
class Config(OwnedDict):
    """The config of one component: a dictionary whose keys are also attributes.

    `fields_set` has the names of the fields that were set, `extra_fields` the keys without a field. As in diffusers,
    the key `_use_default_values` lists the fields that were not set. Raises `InputError` for a value that the
    component does not support.
    """

    fields_set: ClassVar[frozenset[str]] = frozenset()
    extra_fields: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @classmethod
    def from_args(cls, *args: Any, **settings: Any) -> Self:
        """Return a config from constructor arguments; an unknown keyword is a `TypeError`.

        Keywords that begin with "_", which `**config` of another component has, are ignored, as in diffusers.
        """
        signature = inspect.signature(cls)
        settings = {name: value for name, value in settings.items() if not name.startswith("_")}
        try:
            arguments = signature.bind(*args, **settings).arguments
        except TypeError as error:  # an unknown name, a repeated one, or too many arguments
            expected, got = f"arguments among {', '.join(signature.parameters)}", str(error).removeprefix("got ")
            key = next((name for name in settings if repr(name) in got), cls.__name__)
            raise invalid(InputTypeError, cls.__name__, expected, got, key=key) from error
        return cls.from_dict(arguments)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **changes: Any) -> Self:
        """Return a config from a mapping such as a `config.json` or another component's config.

        Values that were defaults of the other class are replaced by the defaults of this one. Keys without a field
        are kept in `extra_fields`.
        """
        defaults = coerce(settings.get(DEFAULTS, ()), Sequence[str])
        if defaults is INVALID:
            got = short_repr(settings[DEFAULTS])
            raise invalid(InputTypeError, f"{cls.__name__}.{DEFAULTS}", "a list of field names", got, key=DEFAULTS)
        defaults = frozenset(defaults)
        values = {key: value for key, value in settings.items() if key not in defaults} | changes
        names = {f.name for f in fields(cls)} & values.keys()
        config = cls(**{name: values[name] for name in names})
        no_extra = names | {"_class_name", DEFAULTS}
        return config.record_fields(names, {key: value for key, value in values.items() if key not in no_extra})

    def record_fields(self, fields_set: Iterable[str], extra_fields: Mapping[str, Any]) -> Self:
        """Store which fields were set, and keys without a field; return this config."""
        vars(self).update(fields_set=frozenset(fields_set), extra_fields=MappingProxyType(dict(extra_fields)))
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        unset = [name for name in values if name not in self.fields_set]
        dict.update(self, {**extra_fields, **values, DEFAULTS: unset})
        return self

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for f in fields(self):
            value, allowed, kind = getattr(self, f.name), f.metadata.get("allowed"), types.get(f.name, Any)
            if allowed:
                is_list = f.metadata.get("per_block") and isinstance(value, (list, tuple)) and value
                valid = all(is_one_of(entry, allowed) for entry in (value if is_list else [value]))
                coerced = value if valid else INVALID
            else:
                coerced = coerce(value, kind)
            if coerced is INVALID:
                error = InputError if allowed or isinstance(value, Number) else InputTypeError
                expected = " or ".join(dict.fromkeys(map(repr, allowed))) if allowed else describe_type(kind)
                raise invalid(error, f"{type(self).__name__}.{f.name}", expected, short_repr(value), key=f.name)
            object.__setattr__(self, f.name, coerced)
        self.check()
        self.record_fields((f.name for f in fields(self) if getattr(self, f.name) is not f.default), {})

    def check(self) -> None:
        """Raise `InputError` for values that do not fit together; a subclass may also normalize a field here."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.extra_fields[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (dict(self),)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that JSON can represent, nested configs included."""
        return {key: to_jsonable(value) for key, value in self.items() if key != DEFAULTS}

    def explicit(self) -> dict[str, Any]:
        """Return only the fields that were set and the extra ones: the values to pass on to another class."""
        return {key: value for key, value in self.items() if key in self.fields_set or key in self.extra_fields}

    def to_json_string(self) -> str:
        """Return the text of a `config.json`: sorted keys, an indent of two, a newline at the end."""
        return json_text(self.to_dict())


UNCLIPPED = "lambda_min_clipped", -math.inf  # a default of the published format; it is written as -Infinity


def json_text(settings: Mapping[str, Any]) -> str:
    """Return the text of a config file. Raises `InputError` for a value that JSON cannot represent, such as NaN."""
    try:
        json.dumps({name: v for name, v in settings.items() if (name, v) != UNCLIPPED}, sort_keys=True, allow_nan=False)
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        name = next((name for name, value in settings.items() if not is_json_serializable(name, value)), "config")
        got = f"{short_repr(settings.get(name))} ({error})"
        raise invalid(InputError, name, "a value that JSON can represent", got) from error


def is_json_serializable(name: Any, value: Any) -> bool:
    """Return whether an entry of a config can be written as JSON."""
    if (name, value) == UNCLIPPED:
        return True
    try:
        json.dumps({name: value}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(name, str)


def is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """Return whether a string, number or None equals one of these; True does not equal 1."""
    return (value is None or isinstance(value, (str, Number))) and any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed
    )


def to_jsonable(value: Any) -> Any:
    """Convert configs to dictionaries, and tuples, arrays and tensors to lists."""
    if isinstance(value, Mapping):
        return value.to_dict() if isinstance(value, Config) else {key: to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


class Configured:
    """Base of components: constructed from config fields by keyword or position, or from one `Config` or mapping."""

    config_class: ClassVar[type[Config]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_class" in cls.__dict__:  # for help() and editors
            cls.__signature__ = inspect.signature(cls.config_class)

    def __init__(self, *args: Any, **settings: Any):
        super().__init__()
        if "config" in settings and not args:
            args = (settings.pop("config"),)
            if as_settings(args[0]) is None:
                raise invalid(InputTypeError, "config", "a config or a dictionary", short_repr(args[0]))
        if len(args) == 1 and not settings and (config := as_settings(args[0])) is not None:
            config = config if isinstance(config, self.config_class) else self.config_class.from_dict(config)
        else:
            config = self.config_class.from_args(*args, **settings)
        vars(self)["config"] = config.owned_by(self)

    def _config(self) -> Config:
        """The config, a `config_class`: its own, also after a shallow copy. Items assigned to it count."""
        if "config" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no config before its constructor ran")
        if vars(self)["config"]._owner() is not self:
            vars(self)["config"] = vars(self)["config"].owned_by(self)
        return vars(self)["config"]

    def _assign_config(self, settings: Mapping[str, Any]) -> None:
        """Register the entries of a mapping that differ, those in its `_use_default_values` too."""
        if (mapping := as_settings(settings)) is None:
            raise invalid(InputTypeError, "config", "a config or a dictionary", describe(settings))
        old = self.config
        self.register_to_config(**{key: value for key, value in mapping.items() if old.get(key, INVALID) is not value})

    config: Any = property(_config, _assign_config)
    _internal_dict: Any = config  # as diffusers names it, which code for older checkpoints assigns

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **changes: Any) -> Self:
        """Return a component with this config, updated by `changes`; weights, if any, are random.

        Changes without a field in this class are ignored with a warning. With `return_unused_kwargs` the result is a
        tuple: the component, and a dictionary of these changes and of the entries of the config without a field.
        """
        settings = as_settings(config)
        names = {f.name for f in fields(cls.config_class)}
        unused = {name: changes.pop(name) for name in changes.keys() - names}
        if unused and not return_unused_kwargs:
            warn_user(f"{cls.__name__}.from_config: no config fields, ignored: {', '.join(sorted(unused))}")
        if settings is None:
            raise invalid(InputTypeError, "config", "a config or a dictionary", describe(config))
        keys = [key for key in settings if str(key)[:1] != "_"]
        if keys and not names & set(keys):
            raise invalid(InputError, "config", f"at least one config field of {cls.__name__}", short_repr(keys))
        component = cls(cls.config_class.from_dict(settings, **changes))
        return (component, unused | component.extra_settings()) if return_unused_kwargs else component  # type: ignore

    def extra_settings(self) -> dict[str, Any]:
        """Return the entries of the config that are no fields of this class, and its name."""
        return {"_class_name": type(self).__name__, **self.config.extra_fields}

    def register_to_config(self, **changes: Any) -> None:
        """Update `config`, for example after a loaded model has been modified."""
        vars(self)["config"] = self.config_class.from_dict(self.config, **changes).owned_by(self)

    def __getattr__(self, name: str) -> Any:
        """Return an entry of the config as an attribute, as diffusers' older code expects."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]  # of a torch module
        except AttributeError:
            if name not in vars(self).get("config", ()) or name[:2] == "__":
                raise AttributeError(f"{type(self).__name__} has no attribute or config field {name!r}") from None
            return vars(self)["config"][name]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.config.to_json_string().rstrip()}"


def as_settings(value: Any) -> Mapping[str, Any] | None:
    """Return a config, a dictionary or another library's config object as a mapping, or None for other values."""
    if isinstance(value, Mapping):
        return value
    return value.to_dict() if callable(getattr(value, "to_dict", None)) and not isinstance(value, type) else None
