"""Rules for single values of the configuration, and the one-line errors that refuse what breaks them.

A rule says in words what it allows and decides whether a value is allowed; `check` turns a broken rule into a
ConfigError that names field, value and what is allowed. No torch here: a refusal must not wait for its
import.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class ConfigError(Exception):
    """Something the user has to change; `str(error)` is one line that says what and to what."""


class Rule(Protocol):
    @property
    def allowed(self) -> str: ...

    def accepts(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Number:
    """A finite number from an interval, whose ends count unless they are open; `integer` refuses 2.0 as well."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    integer: bool = False

    @property
    def allowed(self) -> str:
        kind = "an integer" if self.integer else "a number"
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"{'>' if self.open_low else '>='} {self.low:g}")
        if self.high < math.inf:
            bounds.append(f"{'<' if self.open_high else '<='} {self.high:g}")
        return " ".join([kind, " and ".join(bounds)]).strip()

    def accepts(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.integer else int | float):
            return False
        if not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


@dataclass(frozen=True)
class Choice:
    """One of a few names."""

    names: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(self.names)

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.names


@dataclass(frozen=True)
class OneOf:
    """One of a few integers."""

    numbers: tuple[int, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(map(str, self.numbers))

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value in self.numbers


@dataclass(frozen=True)
class Series:
    """An integer `step` n + `offset` with n >= 1."""

    step: int
    offset: int

    @property
    def allowed(self) -> str:
        first = ", ".join(str(self.step * n + self.offset) for n in (1, 2, 3))
        return f"{self.step} n + {self.offset} with n >= 1: {first}, ..."

    def accepts(self, value: Any) -> bool:
        return COUNT.accepts(value) and value > self.offset and (value - self.offset) % self.step == 0


@dataclass(frozen=True)
class Flag:
    allowed: str = "true or false"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Text:
    allowed: str = "a text"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value)


@dataclass(frozen=True)
class ListOf:
    """A list whose members keep `rule`; `length` None is any length but zero."""

    rule: Rule
    length: int | None = None
    distinct: bool = False

    @property
    def allowed(self) -> str:
        count = "one or more" if self.length is None else str(self.length)
        return f"a list of {count} {'different ' if self.distinct else ''}values, each {self.rule.allowed}"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, list) or not value or not all(self.rule.accepts(v) for v in value):
            return False
        if self.distinct and len(set(value)) < len(value):
            return False
        return self.length is None or len(value) == self.length


@dataclass(frozen=True)
class Optional:
    """What `rule` allows, or null."""

    rule: Rule

    @property
    def allowed(self) -> str:
        return self.rule.allowed + ", or null"

    def accepts(self, value: Any) -> bool:
        return value is None or self.rule.accepts(value)


FRACTION = Number(0, 1, open_low=True, open_high=True)
POSITIVE = Number(0, open_low=True)
NOT_NEGATIVE = Number(0)
COUNT = Number(1, integer=True)
NATURAL = Number(0, integer=True)


def show(value: Any) -> str:
    """The value as a user would recognise it, shortened to fit a line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def describe(error: OSError) -> str:
    """A file that may not be read or written, and why, in a line."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def nearest(name: Any, valid: Iterable[str]) -> str:
    """`; nearest: …` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(str(name), list(valid), n=3, cutoff=0.6)
    return f"; nearest: {', '.join(close)}" if close else ""


def unknown(field: str, name: Any, valid: Iterable[str], kind: str = "name") -> ConfigError:
    """The error for a name that does not exist; `field` is where it stands."""
    valid = sorted(valid)
    return ConfigError(
        f"{field}: unknown {kind} {show(name)}{nearest(name, valid)}; valid: {', '.join(valid) or 'none'}"
    )


def check(field: str, value: Any, rule: Rule) -> None:
    """Raise ConfigError when `value` breaks `rule`."""
    if not rule.accepts(value):
        choice = rule.rule if isinstance(rule, Optional) else rule
        hint = nearest(value, choice.names) if isinstance(choice, Choice) else ""
        raise ConfigError(f"{field}: {show(value)} is not allowed; expected {rule.allowed}{hint}")


def check_mapping(field: str, value: Any) -> dict[str, Any]:
    """`value` when it is a mapping with text keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{field}: {show(value)} is not allowed; expected a mapping of names to values")
    return dict(value)


def check_fields(field: str, value: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping `value` when it has all the fields of `rules` and no others.

    A rule that is itself a mapping of rules stands for a nested mapping. `field` is "" at the top.
    """
    mapping = check_mapping(field or "params.yaml", value)
    prefix = f"{field}." if field else ""
    for name in mapping:
        if name not in rules:
            raise unknown(prefix + name, name, rules)
    for name, rule in rules.items():
        if name not in mapping:
            expected = "a mapping of " + ", ".join(rule) if isinstance(rule, Mapping) else rule.allowed
            raise ConfigError(f"{prefix}{name}: is missing; expected {expected}")
        if isinstance(rule, Mapping):
            check_fields(prefix + name, mapping[name], rule)
        else:
            check(prefix + name, mapping[name], rule)
    return mapping
