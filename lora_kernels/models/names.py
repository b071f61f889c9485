"""PEFT's rules for which names and patterns mean which modules, and paths of modules."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def names_match(path: str, names: Iterable[str] | str | None) -> bool:
    """Whether a module's path is meant by a regex (the whole path) or a list of names (the path or its end)."""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def layer_regex(pattern: str) -> str:
    """The regex for a path with a layer's number behind `pattern`."""
    return rf"(?:^|.*?\.){pattern}\.(\d+)\."


def layer_index(path: str, patterns: list[str] | str | None) -> int | None:
    """The number behind the first of `patterns` that is in a module's path, or without them the first behind two names."""
    named = [patterns] if isinstance(patterns, str) else patterns
    regexes = [layer_regex(pattern) for pattern in named] if named else [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(regex, path) for regex in regexes) if match), None)
    return None if found is None else int(found[1])


def trained_whole(path: str, names: Iterable[str] | None) -> bool:
    """Whether modules_to_save means a module: PEFT takes any path with this end, "input_layernorm" for "norm" too."""
    return any(path.endswith(name) for name in names or ())


def first_match(patterns: Mapping[str, _Number], path: str, default: _Number) -> _Number:
    """The value of the first {name or regex: value} that matches the end of a module's path."""
    return next((value for key, value in patterns.items() if pattern_matches(key, path)), default)


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a name or regex matches the end of a module's path."""
    return re.match(pattern_regex(pattern), path) is not None


def pattern_regex(pattern: str) -> str:
    """The regex for a path with an end that a name or regex matches."""
    return rf"(.*\.)?({pattern})$"


def parents(path: str) -> list[str]:
    """The path itself and the modules around it, innermost first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def grouped(reasons: dict[str, str]) -> list[str]:
    """Lines "path: reason" for people, one for all paths of the same reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(path)
    return [f"{found[0]}{f' and {len(found) - 1} more' * (len(found) > 1)}: {reason}" for reason, found in paths.items()]
