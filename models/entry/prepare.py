# SPDX-License-Identifier: Apache-2.0
"""Prepare datasets: ``python -m models.entry.prepare COMMAND …``, or ``qwen-harness data COMMAND …``.

Every command that writes makes a whole, indexed dataset or nothing; it can be stopped and run again, and it never
writes over something that is there.
"""

import logging
import sys

import typer

from models.contract.errors import HarnessError
from models.entry import prepare_build, prepare_tars
from models.entry.prepare_options import console

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = {
    "synth": prepare_build.synth,
    "llava-pretrain": prepare_build.llava_pretrain,
    "sharegpt": prepare_build.sharegpt,
    "llava-instruct": prepare_build.llava_instruct,
    "photos": prepare_build.photos,
    "datajuicer": prepare_tars.datajuicer,
    "migrate": prepare_tars.migrate,
    "index": prepare_tars.index,
    "inspect": prepare_tars.inspect,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.command("synthetic", help="The same as synth.")(prepare_build.synth)

preparing = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
for name in (
    "synth",
    "synthetic",
    "llava-pretrain",
    "sharegpt",
    "llava-instruct",
    "datajuicer",
    "migrate",
    "index",
):
    preparing.command(name)(COMMANDS.get(name, prepare_build.synth))
app.add_typer(
    preparing, name="prepare", help="The commands that make a dataset, by their long name: prepare NAME."
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 for an error that is explained, or what typer says for wrong usage."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        app(arguments, prog_name="data")
    except HarnessError as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except SystemExit as stop:  # how typer ends, well or with its own message about wrong usage
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
