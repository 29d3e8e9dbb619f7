"""Moved to ``sdeblend.shell.cli``; scripts that were installed before still ask here."""

from sdeblend.shell.cli import main as main
