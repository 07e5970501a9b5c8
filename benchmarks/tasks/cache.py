"""What took minutes to make is kept, and found again by what it was made from."""

import os
from collections.abc import Callable
from pathlib import Path

from moe_spec.files import new_directory, sha256_text
from moe_spec.record import Json, Record, dump, parse_object

VARIABLE = "MOE_EDGE_CACHE"
RECIPE = "recipe.json"


def cache_root() -> Path:
    """The directory in the environment's ``MOE_EDGE_CACHE``, or ``~/.cache/moe-edge``."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "moe-edge"


def cached(name: str, recipe: Json, make: Callable[[Path], Json]) -> Path:
    """The directory that ``make`` fills; made once for every ``recipe``.

    Args:
        name: what the directory's name begins with, for people.
        recipe: all that the result depends on.
        make: given an empty directory; returns what else to note in its recipe.json. If it fails, nothing is left
            behind.
    """
    directory = cache_root() / f"{name}-{sha256_text(dump(recipe))[:12]}"
    if not directory.is_dir():
        with new_directory(directory) as staging:
            noted = make(staging)
            (staging / RECIPE).write_text(dump(recipe | noted) + "\n", encoding="utf-8")
    return directory


def noted(directory: Path, name: str) -> float:
    """A number that ``cached`` noted beside what it made."""
    path, remake = directory / RECIPE, f"remove {directory}; it is made again"
    return Record(parse_object(path, path.read_bytes(), remake), str(path), remake).take(name, float)
