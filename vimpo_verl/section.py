"""Reads a section of verl's configuration into a dataclass's values, every problem named at once. Standard library only.

A check takes a value as YAML or Hydra hand it over and returns (complaint, value): the complaint says what to write
instead and is "" where the value will do.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], tuple[str, Any]]


def read(section: Any, name: str, checks: Mapping[str, Check], example: str) -> tuple[dict[str, Any], list[str]]:
    """The usable values of a section, and what is wrong with the rest.

    Args:
        section: what stands under `name`; None if the user gave nothing.
        name: the section's full name, such as "algorithm.vimpo".
        checks: key -> check; these are all the keys there are.
        example: what to write instead of something that is no section.

    Returns:
        Key -> value in its type, and one sentence a problem, each naming the key and what to write instead.
    """
    if section is None:
        return {}, []
    if not isinstance(section, Mapping):
        return {}, [f"{name}={section!r} is not a section: write {example}"]
    values, problems = {}, [_unknown_key(name, key, checks) for key in section if key not in checks]
    for key, check in checks.items():
        if key in section:
            complaint, value = check(section[key])
            if complaint:
                problems.append(f"{name}.{key}={section[key]!r}: {complaint}")
            else:
                values[key] = value
    return values, sorted(problems)


def _unknown_key(section: str, key: Any, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {section}.{near[0]}?" if near else "the keys are " + ", ".join(sorted(known))
    return f"{section}.{key} does not exist: {hint}"


def number(value: Any) -> float | None:
    """A finite number, also from text such as 5e-4, which YAML 1.1 leaves a string; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def number_where(holds: Callable[[float], bool], complaint: str) -> Check:
    """A check for finite numbers of which `holds` is true."""

    def check(value: Any) -> tuple[str, Any]:
        found = number(value)
        return ("", found) if found is not None and holds(found) else (complaint, None)

    return check


def flag(value: Any) -> tuple[str, Any]:
    """A check for true and false."""
    return ("", value) if isinstance(value, bool) else ("write true or false", None)


def integer(value: Any) -> tuple[str, Any]:
    """A check for integers."""
    return ("", value) if isinstance(value, int) and not isinstance(value, bool) else ("write an integer", None)


def one_of(*choices: str) -> Check:
    """A check for words."""

    def check(value: Any) -> tuple[str, Any]:
        return ("", value) if value in choices else (f"write one of {', '.join(choices)}", None)

    return check
