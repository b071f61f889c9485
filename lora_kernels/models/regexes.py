"""How long a regex of a file may take: Python's re has no limit of time, and ten characters can ask for a year of it."""

import re
from dataclasses import dataclass

REPEATS = 5  # one after another: .*.*.*.*.*x tries 8 million ways through a path of 60 characters, 0.1 s
CHOICES = 16  # (a|b) or a? one after another, each of which may double the ways
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\??|(?:[*+?]|\{(?:\d+,?\d*|,\d+)\})[?+]?|\S", re.DOTALL)


@dataclass
class _Item:
    """What is tried one after another in an alternative, and the most of it in the alternatives before."""

    repeats: int = 0
    choices: int = 0
    most: tuple[int, int] = (0, 0)
    alternatives: int = 1

    def end(self) -> None:
        self.most = max(self.most[0], self.repeats), max(self.most[1], self.choices)
        self.repeats = self.choices = 0


def why_slow(regex: str) -> str | None:
    """Why a valid regex may take a time that is exponential in a path's length, or nearly; None if it may not.

    A repeat of what holds a repeat or a choice has as many ways as a path has parts: (a+)+, (a|ab)*.
    """
    groups, inside = [_Item()], 0  # of what the token before closed, how many choices it holds
    for token in _TOKENS.findall(regex):
        body, inside, group = inside, 0, groups[-1]
        if token[0] == "(":
            groups.append(_Item())
        elif token == ")" and len(groups) > 1:
            group.end()
            groups.pop()
            repeats, choices = group.most
            inside = repeats + choices + (group.alternatives > 1)
            groups[-1].repeats += repeats
            groups[-1].choices += choices + (group.alternatives > 1)
        elif token == "|":
            group.end()
            group.alternatives += 1
        elif (times := _times(token)) > 1:
            if body:
                return "it repeats what is a repeat or a choice itself"
            group.repeats += not token[1:-1].isdigit()  # {3} is one way
        elif times == 1:
            group.choices += 1
    groups[0].end()
    repeats, choices = groups[0].most
    if repeats > REPEATS or choices > CHOICES:
        return f"it has {repeats} repeats and {choices} choices one after another, more than {REPEATS} and {CHOICES}"
    return None


def _times(token: str) -> float:
    """How often at most a token repeats what is before it; 0 for one that repeats nothing."""
    if token[0] != "{" or len(token) == 1:
        return {"*": float("inf"), "+": float("inf"), "?": 1}.get(token[0], 0)
    least, comma, most = token.rstrip("?+")[1:-1].partition(",")
    return float(most or "inf") if comma else float(least)
