"""The logger of the library: silent, unless the program that uses it says where to.  Imported by what logs only."""

from __future__ import annotations

import logging

__all__ = ["log"]

log = logging.getLogger("shlock")
log.addHandler(logging.NullHandler())
