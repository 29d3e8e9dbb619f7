"""``python -m sdeblend.finetune``, for ``accelerate launch -m``: the command ``sdeblend finetune``."""

import sys

from sdeblend.shell.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
