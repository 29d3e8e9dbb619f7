"""``accelerate launch -m sdeblend.evaluate CONFIG.toml``: the command ``sdeblend evaluate``, in every process."""

import sys

from sdeblend.shell.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
