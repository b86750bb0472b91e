"""The command `vimpo`, also `python -m vimpo_verl`."""

import argparse
import os
import sys
from collections.abc import Sequence

from vimpo_verl.compare import command as compare
from vimpo_verl.credit import command as credit

CLOSED_PIPE = 141  # as a shell has it of a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit status."""
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("vimpo: standard output was closed before all was printed; files are whole", file=sys.stderr)
        return CLOSED_PIPE
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="vimpo", description="VIMPO (arXiv 2606.20008) as an add-on to verl.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say whether algorithm.adv_estimator=vimpo would work in this environment")
    comparing = commands.add_parser("compare", help="compare runs: a table and plots, by step, tokens and wall-clock")
    compare.add_arguments(comparing)
    crediting = commands.add_parser("credit", help="a page: which tokens of answers the policy gives credit to")
    credit.add_arguments(crediting)
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        from vimpo_verl import check

        return check.main()
    if arguments.command == "compare":
        return compare.main(arguments)
    if arguments.command == "credit":
        return credit.main(arguments)
    parser.error(f"unknown command {arguments.command}")


if __name__ == "__main__":
    raise SystemExit(main())
