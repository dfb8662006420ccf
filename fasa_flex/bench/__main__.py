"""``python -m fasa_flex.bench``: see `fasa_flex.bench.command`."""

import sys

from fasa_flex import cli

if __name__ == "__main__":
    sys.exit(cli.main(["bench", *sys.argv[1:]]))
