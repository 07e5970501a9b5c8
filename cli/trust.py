"""What is said before code of a checkpoint's own runs."""

from pathlib import Path

from cli import console


def warn_of_code(*checkpoints: Path | None, trusted: bool) -> None:
    """Name the files of ``checkpoints`` that are about to run, with their sha256, where the user trusts them.

    Raises:
        UserError: code of another repository, or a file that is missing.
    """
    there = [path for path in checkpoints if trusted and path is not None and (path / "config.json").is_file()]
    if not there:
        return
    from models.checkpoints import own_code

    for checkpoint in there:
        if code := own_code(checkpoint):
            console.warning(f"{checkpoint} runs code of its own, with your rights on this machine:")
            for name, sha256 in code.items():
                console.warning(f"  {sha256}  {name}")
