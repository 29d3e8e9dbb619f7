"""``python -m proofs_checks``: run all checks."""

import sys

from sdeblend.shell.cli import main

sys.exit(main(["verify", *sys.argv[1:]]))
