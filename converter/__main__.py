"""`python -m reattend`."""

from __future__ import annotations

from reattend.cli import main

main()
