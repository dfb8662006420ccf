"""``python -m fasa_flex.bench``: see `fasa_flex.bench.command`."""

import sys

from fasa_flex.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
