"""From a shell: `quadapter run [model]` is the main job, fold a part of it; others follow it."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import QuadapterError
from . import compile as compile_command
from . import evaluate, fold, generate, report, run, verify
from .crash import say
from .terminal import any_terminal

COMMANDS = (run, fold, report, compile_command, verify, generate, evaluate)
"""In the order that the help has."""


@any_terminal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process when not given.

    Returns:
        The exit code: 0; 1 when `verify` has findings; 2 when the input was wrong, which one line
        on stderr explains; 70 when the error is ours, and a file has the report; 130 after Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(given)
    command = vars(args).pop("command")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|aimet_torch")
            return command(args) or 0
    except (QuadapterError, OSError) as error:
        print(f"quadapter: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quadapter: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001  whatever it is, it is a report and not a traceback
        say(given, error)
        return 70


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quadapter", description=__doc__)
    parser.add_argument("--version", action="version", version=f"aimet_quadapter {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_command(commands)
    return parser
