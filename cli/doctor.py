"""Say what works on this machine, why the rest does not, and what to install.

Everything is tried: the packages of each extra (`pip install 'moe-edge[NAME]'`) are imported, each provider of ONNX
Runtime multiplies two matrices, TensorRT and TensorRT-RTX build an engine that does. It exits with 0 whatever it finds.

Example: moe-edge doctor
Example: moe-edge doctor --json
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from cli import console
from cli.options import AsJson

if TYPE_CHECKING:
    from runtime.doctor import Finding


def doctor(as_json: AsJson = False) -> None:
    """Try everything and print what works."""
    from runtime.doctor import doctor as diagnose

    with console.progress("looking around") as tell:
        health = diagnose(tell)
    console.result(health.machine, health.to_json(), as_json)
    if not as_json:
        _show("Extras of moe-edge", health.extras)
        _show("Providers of ONNX Runtime", health.providers)
        _show("TensorRT", (health.gpu, *health.backends))
        _show("Targets", health.targets)


def _show(title: str, findings: Sequence["Finding"]) -> None:
    """What works and what does not, with what to do about it below."""
    table = Table.grid(padding=(0, 2))
    for width in (14, None, None):
        table.add_column(min_width=width, overflow="fold")
    for finding in findings:
        said = f"{finding.what}\n-> {finding.hint}" if finding.hint else finding.what
        mark = "[green]yes[/]" if finding.works else "[yellow]no[/]"
        table.add_row(escape(finding.name), mark, escape(said))
    console.out.print(f"\n[bold]{title}[/]")
    console.out.print(Padding(table, (0, 0, 0, 2)))
