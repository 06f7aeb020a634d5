"""Globs such as photos/**/*.jpg, matched against paths that are found by a walk.

The standard library's glob follows links round and round; a walk visits each folder once.
"""

from fnmatch import fnmatchcase
from functools import lru_cache


class GlobPattern:
    """The part of a glob behind its fixed folders."""

    def __init__(self, pattern: str) -> None:
        self._parts = tuple(part for part in pattern.split("/") if part not in ("", "."))
        # The folders of one photo are those of the next one.
        self._after = lru_cache(maxsize=1024)(self._step_through)

    def matches(self, relative: str) -> bool:
        """Whether a file's path, below the fixed part, is meant."""
        return len(self._parts) in self._after(relative, True)

    def may_hold(self, relative: str) -> bool:
        """Whether files in this folder may be meant."""
        return bool(self._after(relative, False))

    def _step_through(self, relative: str, is_file: bool) -> frozenset[int]:
        """How many parts of the pattern may have been used up after `relative`; for folders, only
        such that leave some."""
        states = self._opened({0})
        for name in relative.split("/"):
            reached = set()
            for state in states:
                if state < len(self._parts):
                    part = self._parts[state]
                    if part == "**":
                        reached.add(state)
                    elif fnmatchcase(name, part):
                        reached.add(state + 1)
            states = self._opened(reached)
        return frozenset(states if is_file else states - {len(self._parts)})

    def _opened(self, states: set[int]) -> set[int]:
        """With `**` standing for no folder at all; at the end it stands for any file."""
        opened = set(states)
        for state in sorted(states):
            while state < len(self._parts) and self._parts[state] == "**":
                state += 1
                opened.add(state)
        return opened


def split_glob(source: str, magic: str = "*?[") -> tuple[str, str] | None:
    """(folder before the first special character, pattern behind it); None where there is none."""
    parts = source.split("/")
    for index, part in enumerate(parts):
        if any(one in part for one in magic):
            fixed = "/".join(parts[:index])
            return fixed or ("/" if source.startswith("/") else "."), "/".join(parts[index:])
    return None
