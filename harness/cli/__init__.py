# SPDX-License-Identifier: Apache-2.0
"""`qwen-harness`: the command line. It selects and limits; no option edits a recipe value."""

import logging
import sys

from models.contract.errors import EnvironmentMismatch, HarnessError

HARNESS_ERROR_EXIT = 3
"""A HarnessError that is no verdict: bad input, missing file. 2 is a usage error, 10 to 15 are verdicts."""
INTERRUPTED_EXIT = 130
HANDED_OVER = ("convert", "data", "generate")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the program; exits with the verdict's code where there is one."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        if arguments and arguments[0] in HANDED_OVER:
            from harness.cli.handover import hand_over

            sys.exit(hand_over(arguments[0], arguments[1:]))
        from harness.cli.app import app

        app(args=arguments, prog_name="qwen-harness", standalone_mode=True)
    except HarnessError as error:
        sys.stderr.write(
            "\n".join([str(error), *(f"  {note}" for note in getattr(error, "__notes__", []))]) + "\n"
        )
        sys.exit(14 if isinstance(error, EnvironmentMismatch) else HARNESS_ERROR_EXIT)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED_EXIT)
