"""Moved to ``sdeblend.shell.files``."""

from sdeblend.shell.files import write_atomically as write_atomically
