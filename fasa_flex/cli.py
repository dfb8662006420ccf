"""The ``fasa-flex`` command. A subcommand is a `Command` in ``COMMANDS``: its words, its options, what it does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args


@dataclass(frozen=True)
class Command:
    """One subcommand; what it needs beyond the standard library is imported when it runs.

    Attributes:
        name: The word behind ``fasa-flex``.
        summary: One line for ``fasa-flex --help``.
        options: Adds the arguments.
        run: Does the work. A ValueError from it ends the command with its sentence and exit code 2.
    """

    name: str
    summary: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="an --output_path of lm_eval with --log_samples; the first is compared with",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw score against budget (needs matplotlib)")
    parser.add_argument("--draws", type=int, default=10_000, help="bootstrap resamples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")


def _compare(options: argparse.Namespace) -> None:
    from fasa_flex import compare

    _check_folder(options.plot)
    runs = [compare.Run.load(folder) for folder in options.runs]
    rows = compare.compare(runs, draws=options.draws, seed=options.seed)
    print(compare.table(rows))
    for warning in compare.warnings(runs):
        print(f"warning: {warning}", file=sys.stderr)
    if options.plot is not None:
        from fasa_flex.plots import score_curves

        score_curves(compare.curve_rows(rows)).savefig(options.plot, dpi=150)
        print(f"drawn to {options.plot}", file=sys.stderr)


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    from fasa_flex.config import Sharing
    from fasa_flex.criteria import CRITERIA

    parser.add_argument(
        "profiles", nargs="+", metavar="PROFILE", help="a folder of save_pretrained, or a Hub repository"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw heat maps and dominance (needs matplotlib)")
    parser.add_argument("--n-tip", type=int, metavar="N", help="dominant chunks a head keeps (default: head_dim / 8)")
    parser.add_argument(
        "--per", choices=get_args(Sharing), default="kv_head", help="whose chunks (default: %(default)s)"
    )
    parser.add_argument("--criterion", choices=CRITERIA, help="how they are chosen (default: the best of a profile)")


def _inspect(options: argparse.Namespace) -> None:
    from fasa_flex import inspection
    from fasa_flex.profile import FasaProfile

    profiles = [FasaProfile.from_pretrained(name) for name in options.profiles]
    _check_folder(options.plot)
    n_tip = inspection.default_n_tip(profiles[0]) if options.n_tip is None else options.n_tip
    print(inspection.report(options.profiles, profiles, n_tip, options.per, options.criterion))
    if options.plot is not None:
        from fasa_flex.plots import inspection as drawn

        drawn(options.profiles, profiles, n_tip, options.per, options.criterion).savefig(options.plot, dpi=150)
        print(f"drawn to {options.plot}", file=sys.stderr)


def _check_folder(file: Path | None) -> None:
    """Refuse a picture that could not be written, before the work is done."""
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no folder to draw {file.name} in; make it, or name another.")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    from fasa_flex.bench.command import add_arguments

    add_arguments(parser)


def _bench(options: argparse.Namespace) -> None:
    from fasa_flex.bench.command import run

    run(options)


COMMANDS: tuple[Command, ...] = (
    Command("compare", "compare runs of lm-eval, document by document", _compare_options, _compare),
    Command("inspect", "show what a profile holds, and how far several agree", _inspect_options, _inspect),
    Command("bench", "measure dense attention and FASA on this machine", _bench_options, _bench),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        arguments: Words behind ``fasa-flex``; those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="fasa-flex", description="Frequency-aware sparse attention.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.options(own)
        own.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"fasa-flex: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
