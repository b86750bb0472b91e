"""The kinds of things that we rely on in verl; each says what changed, or None."""

import importlib
import inspect
from dataclasses import dataclass
from types import CodeType


def find(place: str):
    """ "package.module:Class.attribute" -> the object."""
    module, _, path = place.partition(":")
    found = importlib.import_module(module)
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


@dataclass(frozen=True)
class Called:
    """We (or verl, of a function that we put in the place of one of verl's) call it with these arguments."""

    positional: int = 0
    keywords: tuple[str, ...] = ()

    def problem(self, function) -> str | None:
        try:
            inspect.signature(function).bind(*[None] * self.positional, **dict.fromkeys(self.keywords))
        except TypeError as error:
            return f"{error}; its parameters are now {inspect.signature(function)}"


@dataclass(frozen=True)
class Parameters:
    """We override or wrap it: verl calls ours with exactly these parameters."""

    names: tuple[str, ...]

    def problem(self, function) -> str | None:
        # Ray adds a parameter to the methods of a class that an actor has been made of in this process.
        found = tuple(name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx")
        return None if found == self.names else f"its parameters were {self.names} and are now {found}"


@dataclass(frozen=True)
class Mentions:
    """Its code reads or writes these names: fields of a batch, flags, keywords, attributes."""

    names: tuple[str, ...]

    def problem(self, function) -> str | None:
        known = set(names_in(inspect.unwrap(function).__code__))
        missing = [name for name in self.names if name not in known]
        return f"its code no longer has {', '.join(missing)}" if missing else None


@dataclass(frozen=True)
class Holds:
    """A registry with these keys, or an object with these attributes."""

    names: tuple[str, ...]

    def problem(self, owner) -> str | None:
        missing = [n for n in self.names if not (n in owner if isinstance(owner, dict) else hasattr(owner, n))]
        return f"it no longer has {', '.join(missing)}" if missing else None


@dataclass(frozen=True)
class Derives:
    """A class of ours can be derived from it: no abstract method is left that ours does not define."""

    ours: str

    def problem(self, base) -> str | None:
        ours = find(self.ours)
        if not issubclass(ours, base):
            return f"{self.ours} does not derive from it"
        left = sorted(getattr(ours, "__abstractmethods__", ()))
        return f"{self.ours} lacks {', '.join(left)}" if left else None


def names_in(code: CodeType):
    """Every name and string constant of a function's code, also of the functions inside it."""
    yield from code.co_names
    yield from code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
        elif isinstance(constant, (tuple, frozenset)):
            yield from (part for part in constant if isinstance(part, str))
        elif isinstance(constant, str):
            yield constant
