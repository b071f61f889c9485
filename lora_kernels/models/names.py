"""PEFT's rules for which names and patterns mean which modules, and paths of modules."""

import re
from collections.abc import Collection, Iterable, Iterator
from heapq import merge

# a regex of characters that stand for themselves, escaped ones, and points, which stand for any
_PLAIN = re.compile(r"(?:[^\\^$*+?{}\[\]|()]|\\[^0-9A-Za-z])*", re.DOTALL)


def names_match(path: str, names: Collection[str] | str | None) -> bool:
    """Whether a module's path is meant by a regex (the whole path) or a list of names (the path or its end)."""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(tail in names for tail in tails(path))


def layer_regex(pattern: str) -> str:
    """The regex for a path with a layer's number behind `pattern`."""
    return rf"(?:^|.*?\.){pattern}\.(\d+)\."


def layer_index(path: str, patterns: list[str] | str | None) -> int | None:
    """The number behind the first of `patterns` that is in a module's path, or without them the first behind two names."""
    named = [patterns] if isinstance(patterns, str) else patterns
    regexes = [layer_regex(pattern) for pattern in named] if named else [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(regex, path) for regex in regexes) if match), None)
    return None if found is None else int(found[1])


def numbered(paths: Iterable[str]) -> set[str]:
    """What is before a number inside one of `paths`, which layers_pattern may mean: "model.layers" of "model.layers.0.norm"."""
    return {found for path in paths for found in parents(path)[2:] if path.removeprefix(f"{found}.").split(".")[0].isdigit()}


def end_of(path: str) -> str:
    """The last name of a path."""
    return path.rpartition(".")[2]


def trained_whole(path: str, names: Iterable[str] | None) -> bool:
    """Whether modules_to_save means a module: PEFT takes any path with this end, "input_layernorm" for "norm" too."""
    return any(path.endswith(name) for name in names or ())


class Patterns:
    """Names and regexes, as in rank_pattern, each of which means the modules whose path it matches, or the end of it.

    Most are names or whole paths, and there may be one for each of thousands of layers: these are looked up and not tried.
    """

    def __init__(self, patterns: Iterable[str]):
        self._patterns = list(patterns)
        self._regexes: list[tuple[int, re.Pattern[str]]] = []
        # length -> where any character fits -> the pattern without these -> its numbers
        self._plain: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        for number, pattern in enumerate(self._patterns):
            if _PLAIN.fullmatch(pattern) is None:
                self._regexes.append((number, re.compile(pattern_regex(pattern))))
                continue
            characters = re.findall(r"\\?.", pattern, re.DOTALL)
            free = tuple(place for place, character in enumerate(characters) if character == ".")
            text = _without("".join(character[-1] for character in characters), free)
            self._plain.setdefault(len(characters), {}).setdefault(free, {}).setdefault(text, []).append(number)

    def matching(self, path: str) -> Iterator[str]:
        """Those that mean the module at `path`, in their order, of which in PEFT the first counts."""
        plain = [
            number
            for tail in tails(path)
            for free, numbers in self._plain.get(len(tail), {}).items()
            for number in numbers.get(_without(tail, free), ())
        ]
        regexes = (number for number, regex in self._regexes if regex.match(path))
        return (self._patterns[number] for number in merge(sorted(plain), regexes))


def pattern_regex(pattern: str) -> str:
    """The regex for a path with an end that a name or regex matches."""
    return rf"(.*\.)?({pattern})$"


def _without(text: str, places: tuple[int, ...]) -> str:
    """The text with a point at each of `places`."""
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)


def tails(path: str) -> list[str]:
    """The path itself and what is behind each of its points, longest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


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
