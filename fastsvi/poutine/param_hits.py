"""Which params a handler was told about and which it met: for its warning at the end."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from fastsvi.errors import FastSVIWarning
from fastsvi.poutine.validation import is_checking


class ParamHits:
    """Names of the params that were met, split by whether the handler knew them."""

    def __init__(self) -> None:
        self.hits: set[str] = set()
        self.misses: set[str] = set()

    def note(self, name: str, known: bool) -> None:
        (self.hits if known else self.misses).add(name)

    def warn_of_unused(self, names: Collection[Any], what: str) -> None:
        """Warn of ``names`` that were never met. The usual cause is a misspelled name."""
        unused = set(names) - self.hits
        if unused and is_checking():
            warnings.warn(
                f"{what} names params that the program does not have: {sorted(unused)}; did you "
                f"mean one of {sorted(self.misses)}?",
                FastSVIWarning,
                stacklevel=4,
            )
