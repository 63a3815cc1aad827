"""The command line: results on stdout, progress on stderr, exit code 2 and one line for bad input."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from grinqh.benchmark import versions
from grinqh.cli import bench, convert, generate, info, ppl
from grinqh.cli.common import calm_libraries
from grinqh.errors import InputError

COMMANDS = (convert, generate, ppl, info, bench)
BAD_INPUT = 2  # argparse's exit code, too


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = _parser().parse_args(arguments)
    chosen.command_line = shlex.join(["grinqh", *arguments])
    calm_libraries()
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        chosen.run(chosen)
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of stdout has gone, as `head` does
            sys.stderr.close()
            return 0
        print(f"grinqh {chosen.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grinqh", description="Language models whose precision is chosen per token and channel, at run time."
    )
    parser.add_argument("--version", action="version", version=f"grinqh {versions()['grinqh']}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that what is half written is cleaned up.
    raise SystemExit(128 + number)
