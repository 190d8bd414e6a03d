"""Errors of handlers and plates; each is also the builtin that Pyro raises in the same case."""

from __future__ import annotations

from fastsvi.errors import FastSVIError, SiteError


class HandlerError(FastSVIError, ValueError):
    """A handler is given a wrong argument, or is installed or removed out of order."""


class PlateError(SiteError, ValueError):
    """A plate's name, size or dim is wrong or collides with another plate's."""


class EmptyPlateError(PlateError, ZeroDivisionError):
    """A plate of size zero: its log-density could not be scaled."""
