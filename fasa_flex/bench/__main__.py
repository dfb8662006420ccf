"""``python -m fasa_flex.bench``, the same as ``fasa-flex bench`` (`fasa_flex.bench.command`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fasa_flex import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fasa-flex bench``; returns the exit code."""
    return cli.main(["bench", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
