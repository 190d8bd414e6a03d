"""What the tests of native loops share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of compiled steps of the module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTSVI_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
