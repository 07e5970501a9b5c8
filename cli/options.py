"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option("-o", "--output", help="What to write; it must not exist yet.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that config.json names: read them first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
MinShapes = Annotated[list[str] | None, typer.Option("--minShapes", help="Smallest: NAME:DIMxDIM,...")]
OptShapes = Annotated[list[str] | None, typer.Option("--optShapes", help="Shapes to be quick at.")]
MaxShapes = Annotated[list[str] | None, typer.Option("--maxShapes", help="Largest shapes.")]
