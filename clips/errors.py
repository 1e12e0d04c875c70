"""The errors that a user can cause, each one line: the thing, what was expected, what was found, what to do."""

from __future__ import annotations


class InputError(Exception):
    """Something that the user gave is wrong; commands print it as one line, without a traceback, and exit with 2.

    No ValueError: an `except ValueError` around a decoder, or the command-line parser's own, must not catch it.
    """


class ClipError(InputError):
    """One clip cannot be read: its text names shard, key, member and offset."""
