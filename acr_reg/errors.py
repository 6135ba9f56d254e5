"""What users of the library can put right: the errors that it raises by names of its own."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """No attention, or not the attention that was asked for, was or could be captured."""


class LayoutError(ValueError):
    """The grid or the prefix of a layer's tokens is not known, or more than one fits."""


class CommandError(Exception):
    """Something the user of a command can put right; shown as one message, without a traceback."""
