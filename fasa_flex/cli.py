"""The ``fasa-flex`` command. A subcommand is a `Command` in ``COMMANDS``: its name, summary, options and function.

Each subcommand imports torch and transformers only when it runs, so that ``--help`` and usage errors are fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fasa_flex.bench.options import DTYPES
from fasa_flex.bench.options import add_arguments as _bench_options
from fasa_flex.commands.text_files import texts_of
from fasa_flex.core.option_types import Backend, Criterion, GroupReduce, Sharing


@dataclass(frozen=True)
class Command:
    """One subcommand, which imports packages beyond the standard library only when it runs.

    Attributes:
        name: the word after ``fasa-flex``.
        summary: one line for ``fasa-flex --help``.
        options: adds the arguments to a parser.
        run: runs the command. A ValueError prints its message and ends the process with exit code 2.
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
        help="an --output_path of lm_eval with --log_samples; the first is the baseline",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw score against budget (needs matplotlib)")
    parser.add_argument("--draws", type=int, default=10_000, help="bootstrap resamples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")


def _compare(options: argparse.Namespace) -> None:
    from fasa_flex.commands import plots as drawing
    from fasa_flex.report import compare

    drawing.check(options.plot)
    runs = [compare.Run.load(folder) for folder in options.runs]
    rows = compare.compare(runs, draws=options.draws, seed=options.seed)
    print(compare.table(rows))
    for warning in compare.warnings(runs):
        print(f"warning: {warning}", file=sys.stderr)
    if options.plot is not None:
        from fasa_flex.report.plots import score_curves

        drawing.draw(score_curves(compare.curve_rows(rows)), options.plot)


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "profiles", nargs="+", metavar="PROFILE", help="a folder of save_pretrained, or a Hub repository"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw heat maps and dominance (needs matplotlib)")
    parser.add_argument("--n-tip", type=int, metavar="N", help="dominant chunks of a head (default: FasaConfig's)")
    parser.add_argument(
        "--per", choices=get_args(Sharing), default="kv_head", help="heads that share chunks (default: %(default)s)"
    )
    parser.add_argument(
        "--criterion", choices=get_args(Criterion), help="how chunks are chosen (default: the profile's best)"
    )


def _inspect(options: argparse.Namespace) -> None:
    from fasa_flex.calibration.profile import FasaProfile
    from fasa_flex.commands import plots as drawing
    from fasa_flex.report import inspection

    profiles = [FasaProfile.from_pretrained(name) for name in options.profiles]
    drawing.check(options.plot)
    n_tip = inspection.default_n_tip(profiles[0]) if options.n_tip is None else options.n_tip
    print(inspection.report(options.profiles, profiles, n_tip, options.per, options.criterion))
    if options.plot is not None:
        from fasa_flex.report.plots import inspection as drawn

        drawing.draw(drawn(options.profiles, profiles, n_tip, options.per, options.criterion), options.plot)


def _bench(options: argparse.Namespace) -> None:
    from fasa_flex.bench.command import run

    run(options)


def _model_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fasa_flex.hf.loading.load_model`."""
    parser.add_argument("model", metavar="MODEL", help="a folder, or a Hub repository")
    parser.add_argument("--gguf-file", metavar="NAME", help="a GGUF file in MODEL, to load instead of safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as saved)")
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if available)")


def _loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    from fasa_flex.hf.loading import load_model

    return load_model(options.model, gguf_file=options.gguf_file, dtype=options.dtype, device=options.device)


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the profile alone")
    parser.add_argument(
        "--text",
        action="extend",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="long texts (default: packaged ones, as of profile=auto)",
    )
    parser.add_argument("--length", type=int, metavar="N", help="most tokens of each text (default: 8192)")
    parser.add_argument("--top-k", type=int, metavar="K", help="K of contextual agreement (default: 256)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="decode steps of each text (default: 64)")


def _calibrate(options: argparse.Namespace) -> None:
    texts = None if options.text is None else texts_of(options.text)
    from fasa_flex.commands.calibrate import calibrate_into

    calibrate_into(options.out, lambda: _loaded(options), texts, options.length, options.top_k, options.max_new_tokens)


def _generate_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument("--prompt", type=Path, required=True, metavar="FILE", help="a text file; - is standard input")
    parser.add_argument("--profile", metavar="PROFILE", help="the model's profile (default: calibrate on the prompt)")
    parser.add_argument("--compare", choices=["dense"], help="also generate with dense attention, and show both")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    _config_options(parser)


def _config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `_config_of`."""
    parser.add_argument("--n-fac", type=_count_or_share, metavar="N", help="tokens a query attends to, or a share")
    parser.add_argument("--n-tip", type=_count_or_share, metavar="N", help="dominant chunks of a head, or a share")
    parser.add_argument("--group-reduce", choices=get_args(GroupReduce), help="how a group's heads rank keys together")
    parser.add_argument("--backend", choices=get_args(Backend), help="attention backend; defaults are FasaConfig's")


def _config_of(options: argparse.Namespace) -> Any:
    from fasa_flex.core.config import FasaConfig

    fields = {name: getattr(options, name) for name in ("n_fac", "n_tip", "group_reduce", "backend")}
    return FasaConfig(**{name: value for name, value in fields.items() if value is not None})


def _count_or_share(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a count such as 256 or a share such as 0.1, got {text!r}") from None


def _generate(options: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if str(options.prompt) == "-" else texts_of([options.prompt])[0]
    from fasa_flex.calibration.profile import FasaProfile
    from fasa_flex.commands.generate import encoded, generate

    config = _config_of(options)
    profile = None if options.profile is None else FasaProfile.from_pretrained(options.profile)
    model, tokenizer = _loaded(options)
    if profile is not None:
        profile.check_fits(model)
    ids = encoded(model, tokenizer, prompt, options.max_new_tokens, options.chat)
    generate(model, tokenizer, ids, options.max_new_tokens, config, profile, options.compare == "dense")


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, or a Hub repository")
    parser.add_argument("--profile", metavar="PROFILE", help="the model's profile (default: the first long prompt's)")
    _config_options(parser)
    parser.add_argument(
        "--server",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="last: options of `transformers serve`, such as --server --port 8001 --cb-num-blocks 512",
    )


def _serve(options: argparse.Namespace) -> None:
    from fasa_flex.calibration.profile import FasaProfile
    from fasa_flex.commands.serve import serve

    profile = None if options.profile is None else FasaProfile.from_pretrained(options.profile)
    serve(options.model, options.server, _config_of(options), profile)


def _env(options: argparse.Namespace) -> None:
    from fasa_flex.commands.env import report

    print(report())


COMMANDS: tuple[Command, ...] = (
    Command("generate", "continue a prompt under FASA, and under dense attention", _generate_options, _generate),
    Command("serve", "answer OpenAI's API under FASA, by transformers' continuous batching", _serve_options, _serve),
    Command("calibrate", "find a model's dominant chunks and save its profile", _calibrate_options, _calibrate),
    Command("inspect", "show a profile's dominant chunks, and the overlap of several", _inspect_options, _inspect),
    Command("compare", "compare runs of lm-eval, document by document", _compare_options, _compare),
    Command("bench", "time dense attention and FASA on this machine", _bench_options, _bench),
    Command("env", "print versions, devices and usable backends, for a bug report", lambda parser: None, _env),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code.

    Args:
        arguments: words after ``fasa-flex``; None is those of the process.
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
        sys.stdout.flush()
    except ValueError as error:
        print(f"fasa-flex: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fasa-flex: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `fasa-flex inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
