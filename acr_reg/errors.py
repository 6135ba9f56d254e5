"""The errors that users of the library can correct."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """The requested attention was not captured, or cannot be."""


class LayoutError(ValueError):
    """The grid or the prefix of a layer's tokens is unknown, or several fit."""


class CommandError(Exception):
    """An error that the user of a command can correct, shown as one message without a traceback."""
