"""Settings: what a `config.json` says, frozen, read by attribute or by key.

A part (model, scheduler, image processor) declares its settings as a frozen dataclass derived from
`Config`, whose fields carry the names, order and defaults of the published format. A config also
remembers which fields were given and which keys it did not know (`foreign`), so that settings pass
from one scheduler to another, and back to disk, without loss.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Self

from .errors import InputError, InputTypeError


def one_of(default: Any, *others: Any) -> Any:
    """A field with a default and the only other values that the part can honour."""
    return field(default=default, metadata={"allowed": (default, *others)})


def only(default: Any) -> Any:
    """A field that the format has and every published checkpoint leaves at this one value.

    Where that asks for nothing (None, False, 0), other ways to say so are taken as well.
    """
    ways = () if default else (None, False, 0)
    return field(default=default, metadata={"allowed": (default, *ways)})


DEFAULTS = "_use_default_values"  # diffusers' key for the fields that were not given


@dataclass(frozen=True, eq=False)
class Config(dict[str, Any]):
    """The settings of one part, a dictionary that cannot be changed and is read by attribute as well.

    `given` names the fields that were, `foreign` holds the keys that no field is for. As in diffusers, the key
    `_use_default_values` lists the fields that were not given. Raises `InputError` for a value that the part
    cannot honour.
    """

    given: ClassVar[frozenset[str]] = frozenset()
    foreign: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @classmethod
    def of(cls, *args: Any, **settings: Any) -> Self:
        """From constructor arguments; an unknown keyword is a `TypeError`."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise InputTypeError(f"{cls.__name__}: unexpected argument {unknown[0]!r}; it takes {', '.join(known)}")
        if len(args) > len(known):
            raise InputTypeError(f"{cls.__name__}: {len(args)} arguments came; it takes {', '.join(known)}")
        if twice := set(settings) & set(known[: len(args)]):
            raise InputTypeError(f"{cls.__name__}: {sorted(twice)[0]!r} came both by position and by name")
        return cls.read({**dict(zip(known, args, strict=False)), **settings})

    @classmethod
    def read(cls, settings: Mapping[str, Any], **changes: Any) -> Self:
        """From a mapping such as a `config.json` or another part's config.

        Values that were only defaults over there are left to this class's own defaults; keys this
        class does not know are kept in `foreign`.
        """
        defaults = settings.get(DEFAULTS, ())
        values = {key: value for key, value in settings.items() if key not in defaults} | changes
        known = {f.name for f in fields(cls)} & values.keys()
        config = cls(**{name: values[name] for name in known})
        return config.marked(known, {k: v for k, v in values.items() if k not in known | {"_class_name", DEFAULTS}})

    def marked(self, given: Iterable[str], foreign: Mapping[str, Any]) -> Self:
        """This config, told once which fields were given, and what came beside them."""
        vars(self).update(given=frozenset(given), foreign=MappingProxyType(dict(foreign)))
        names = [f.name for f in fields(self)]
        dict.update(self, foreign, **{name: getattr(self, name) for name in names},
                    **{DEFAULTS: [name for name in names if name not in self.given]})
        return self

    def __post_init__(self) -> None:
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata.get("allowed", ())
            values = value if isinstance(value, (list, tuple)) and value else [value]  # one for each level
            if allowed and not all(any(v == a and isinstance(v, bool) == isinstance(a, bool) for a in allowed)
                                   for v in values):
                choices = " or ".join(map(repr, allowed))
                raise InputError(f"{type(self).__name__}: {f.name}={value!r} is not supported; it can be {choices}")
        self.check()
        self.marked((f.name for f in fields(self) if getattr(self, f.name) is not f.default), {})

    def check(self) -> None:
        """Raise `InputError` for values that do not go together; a subclass may put a field in order as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.foreign[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no setting {name!r}") from None

    def _frozen(self, *_: Any, **__: Any) -> Any:
        raise InputTypeError(f"{type(self).__name__} cannot be changed; its part's register_to_config makes another")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _frozen  # type: ignore

    def __reduce__(self):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _restore, (type(self), values, self.given, dict(self.foreign))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested configs included, ready for JSON."""
        return {key: plain(value) for key, value in self.items() if key != DEFAULTS}

    def explicit(self) -> dict[str, Any]:
        """Only what was given, foreign keys included: what carries over to another class."""
        return {key: value for key, value in self.items() if key in self.given or key in self.foreign}

    def to_json_string(self) -> str:
        """The text of a `config.json`: keys sorted, two spaces, a newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def _restore(cls: type[Config], values: dict[str, Any], given: frozenset[str], foreign: dict[str, Any]) -> Config:
    return cls(**values).marked(given, foreign)


def plain(value: Any) -> Any:
    """Configs to dictionaries, tuples and arrays to lists: what JSON can hold."""
    if isinstance(value, Mapping):
        return value.to_dict() if isinstance(value, Config) else {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
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
        args = (*args, settings.pop("config")) if not args and "config" in settings else args
        if len(args) == 1 and not settings and (given := as_settings(args[0])) is not None:
            self.config = given if isinstance(given, self.config_class) else self.config_class.read(given)
        else:
            self.config = self.config_class.of(*args, **settings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """A part with these settings (and random weights, if it has any); `changes` come on top.

        Changes that this class has no setting for are left out, with a warning.
        """
        settings = as_settings(config)
        known = {f.name for f in fields(cls.config_class)}
        if unknown := sorted(changes.keys() - known):
            warnings.warn(f"{cls.__name__}.from_config: {', '.join(unknown)}: no such setting, so it changes nothing",
                          stacklevel=2)
            changes = {name: value for name, value in changes.items() if name in known}
        if settings is None:
            raise InputTypeError(f"config: {type(config).__name__} came; a config or a dictionary would do")
        return cls(cls.config_class.read(settings, **changes))

    def register_to_config(self, **changes: Any) -> None:
        """Write changed settings into `config`, as a fork does that has changed a loaded part."""
        self.config = self.config_class.read(self.config, **changes)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.config.to_json_string().rstrip()}"


def as_settings(value: Any) -> Mapping[str, Any] | None:
    """A config of ours, a dictionary, or a config object of another library, as a mapping; else None."""
    if isinstance(value, Mapping):
        return value
    return value.to_dict() if callable(getattr(value, "to_dict", None)) and not isinstance(value, type) else None
