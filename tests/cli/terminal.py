"""A terminal in memory, whose clock stands still."""

import io
import re

from rich.console import Console


class Terminal:
    """Takes the place of stderr.

    Attributes:
        now: what its clock says, in seconds.
        file: what was written.
        console: writes to it.
    """

    def __init__(self, width: int = 80, *, is_terminal: bool = True, **environment: str) -> None:
        self.now, self.file = 0.0, io.StringIO()
        self.console = Console(
            file=self.file,
            force_terminal=is_terminal,
            width=width,
            get_time=lambda: self.now,
            _environ={"TERM": "xterm", **environment},
        )

    def lines(self) -> list[str]:
        """All that has ever stood in a line, one after the other, without codes for the cursor and for colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue()).replace("\n", "\r").split("\r")

    def line(self) -> str:
        """What stands in the line of the cursor."""
        return self.lines()[-1]
