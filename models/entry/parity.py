# SPDX-License-Identifier: Apache-2.0
"""Measure the parity matrix: ``python -m models.entry.parity --output reports/parity.json``.

Every tiny model, every modality, every layout on 1, 2, 4 and 8 gloo processes, against transformers in fp32. The file
is what the report draws; cells that are measured again take the place of those in the file.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from models.contract.errors import ConfigError, HarnessError
from models.contract.whole_file import write_whole

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console(stderr=True)


@app.command(help=__doc__)
def measure(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write or add to.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Only this tiny model; give it several times. Default: all.")
    ] = None,
    processes: Annotated[
        list[int] | None, typer.Option(help="Only this number of processes; several times. Default: 1 2 4 8.")
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option(help="Only this modality; several times. Default: all of the model's.")
    ] = None,
) -> None:
    """Measure the cells that were asked for; the exit code is 1 when one does not agree."""
    from models.parity.matrix import LAYOUTS, Cell, matrix_document, modalities_of
    from models.parity.matrix import measure as measure_cells
    from models.parity.oracles import TINY

    cells: list[Cell] = []
    for name in _known(model, list(TINY), "--model"):
        chosen = _known(modality, list(modalities_of(name)), "--modality", partial=True)
        for count in _known(processes, list(LAYOUTS), "--processes"):
            with tempfile.TemporaryDirectory() as folder:
                cells += measure_cells(name, count, Path(folder), modalities=tuple(chosen), on_cell=_say)
            earlier = json.loads(output.read_text(encoding="utf-8")) if output.exists() else None
            write_whole(output, json.dumps(matrix_document(cells, earlier), indent=1) + "\n")
    bad = [cell for cell in cells if not cell.agrees]
    console.print(f"{len(cells) - len(bad)} of {len(cells)} cells agree; {output}")
    if bad:
        raise typer.Exit(1)


def _known(asked: list[Any] | None, known: list[Any], option: str, *, partial: bool = False) -> list[Any]:
    """What was asked for, of what there is; with `partial`, what is not there is left out."""
    if not asked:
        return known
    unknown = [item for item in asked if item not in known]
    if unknown and not partial:
        raise ConfigError(
            f"unknown {option}", expected=", ".join(map(str, known)), got=", ".join(map(str, unknown))
        )
    return [item for item in known if item in asked]


def _say(cell: Any) -> None:
    state = "agrees" if cell.agrees else "DIFFERS"
    numbers = ", ".join(
        f"{name} {getattr(cell, name):.1e}" for name in ("logits", "loss", "gradient_norm", "gradient")
    )
    console.print(
        f"{state:8}{cell.model}, {cell.modality}, {cell.num_processes} x {cell.layout}: {numbers}",
        highlight=False,
    )


def main() -> int:
    """Run the command. Returns 0, 1 for cells that differ, 2 for wrong usage, 3 for an error that is explained."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        app(prog_name="parity")
    except HarnessError as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 3
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
