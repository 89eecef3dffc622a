"""Long lists of names, in a few words."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 4  # at most


def some(names: Sequence[object]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more
