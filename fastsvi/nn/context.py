"""What all modules under one root share: whether a call is under way, and what it has drawn."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

from fastsvi import settings
from fastsvi.poutine.runtime import PARAM_STORE


def join(prefix: str, name: str) -> str:
    """Dotted name of attribute ``name`` in the module named ``prefix`` ("" for the root)."""
    return f"{prefix}.{name}" if prefix else name


class Context:
    """Entered by every call of a module; samples are remembered until the outermost one ends.

    With the setting ``module_local_params`` the outermost call also swaps the contents of the
    param store for those that belong to this root module alone.
    """

    def __init__(self) -> None:
        self.active = 0  # depth of calls under way
        self.used = False  # names are final once a call has been made
        self.cache: dict[str, torch.Tensor] = {}
        self.param_state: Any = {"params": {}, "constraints": {}}
        self._scope: AbstractContextManager | None = None

    def __enter__(self) -> None:
        if not self.active and settings.get("module_local_params"):
            self._scope = PARAM_STORE.scope(state=self.param_state)
            self.param_state = self._scope.__enter__()
        self.active += 1
        self.used = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.active -= 1
        if self.active:
            return
        self.cache.clear()
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.__exit__(kind, error, traceback)
