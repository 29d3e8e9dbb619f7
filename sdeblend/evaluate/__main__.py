"""``accelerate launch -m sdeblend.evaluate CONFIG.toml``: the command, in every process."""

import sys

from sdeblend.cli import sentence
from sdeblend.evaluate.command import main

try:
    sys.exit(main(sys.argv[1:]))
except (ValueError, TypeError, OSError, FloatingPointError) as error:
    print(f"sdeblend.evaluate: {sentence(error)}", file=sys.stderr)
    sys.exit(2)
