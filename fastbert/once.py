"""What is done once in the life of a process, whatever the number of threads that ask for it first."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")

logger = logging.getLogger("fastbert")

# dict.setdefault is one step for all threads. A lock would be one too, but a fork may leave it taken in the child.
_said: dict[str, object] = {}


def once(make: Callable[[Key], Made]) -> Callable[[Key], Made]:
    """A cache that gives every thread the same object; functools.cache gives threads that come first one each."""
    made: dict[Key, Made] = {}

    @functools.wraps(make)
    def get(key: Key) -> Made:
        return made[key] if key in made else made.setdefault(key, make(key))

    return get


def warn_once(message: str) -> None:
    """A warning of the logger "fastbert", the first time that this message is given."""
    mine = object()
    if _said.setdefault(message, mine) is mine:
        logger.warning(message)
