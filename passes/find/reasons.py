"""Why a site is not understood."""

from __future__ import annotations


class NotUnderstood(Exception):
    """A stream, mask or exit that is not of a known form; the text says where it differs."""
