"""The wheel in virtual environments, with what it asks for and nothing else; no network is needed.

The wheel is installed by pip. What it asks for, recursively, an installer would fetch: here it is linked from where the
tests run. What it does not ask for is not there.
"""

import dataclasses
import importlib.metadata
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NAME = "moe-edge"
PACKAGES = ("cli", "exporter", "graph_passes", "models", "moe_spec", "pruning", "report", "runtime")
BESIDE = (
    "CHANGELOG.md",
    "CITATION.cff",
    "DESIGN.md",
    "LICENSE",
    "MANIFEST.in",
    "NOTICE",
    "README.md",
    "pyproject.toml",
)
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"


def build_package(folder: Path) -> None:
    """Copy the packages into ``folder``, and build its ``dist/*.whl`` and ``dist/*.tar.gz``."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, folder)
    subprocess.run([sys.executable, "-P", "-c", BUILD], cwd=folder, check=True, stdout=subprocess.DEVNULL)


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment with moe-edge."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where distributions are."""
        (path,) = self.directory.glob("lib/*/site-packages")
        return path

    @property
    def moe_edge(self) -> Distribution:
        """As the wheel describes it."""
        (found,) = Distribution.discover(name=NAME, path=[str(self.packages)])
        return found

    def run(self, *command: object, cwd: Path | None = None) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command in it: warnings are errors, and no variable leads out of it."""
        environment = {"PATH": str(self.python.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
        program, *arguments = map(str, command)
        done = subprocess.run(
            [self.python.parent / program, *arguments],
            env=environment,
            cwd=cwd or self.directory,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr


def install_base(package: Path, directory: Path) -> Environment:
    """A new environment with the wheel of ``package / "dist"``, and what that asks for without any extra."""
    venv.create(directory)
    made = Environment(directory)
    (wheel,) = (package / "dist").glob("*.whl")
    pip(made, "install", "--quiet", "--no-index", "--no-deps", wheel)
    link(needed(made.moe_edge), made)
    return made


def install_extra(base: Environment, extra: str, directory: Path) -> Environment:
    """A new environment with the same wheel, and what that asks for with one extra."""
    venv.create(directory)
    made = Environment(directory)
    link([base.moe_edge, *needed(base.moe_edge, extra)], made)
    script = base.python.with_name(NAME)
    made.python.with_name(NAME).write_text(script.read_text().replace(str(base.directory), str(directory)))
    made.python.with_name(NAME).chmod(0o755)
    return made


def pip(environment: Environment, *arguments: object) -> str:
    """What the pip of the tests prints when it works on another environment."""
    command = [sys.executable, "-m", "pip", "--python", environment.python, "--disable-pip-version-check", *arguments]
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def needed(wheel: Distribution, extra: str = "") -> list[Distribution]:
    """What an installer would bring for ``wheel[extra]`` on this machine, beside the wheel.

    Raises:
        PackageNotFoundError: the tests themselves run without one of them.
    """
    found: dict[str, Distribution] = {NAME: wheel}
    seen: set[tuple[str, str]] = set()
    waiting = [(NAME, ""), (NAME, extra)]
    while waiting:
        name, wanted = step = waiting.pop()
        if step in seen:
            continue
        seen.add(step)
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                waiting += [(canonicalize_name(requirement.name), more) for more in ("", *requirement.extras)]
    del found[NAME]
    return list(found.values())


def parts(distribution: Distribution) -> Iterator[Path]:
    """The files and folders of a distribution in the folder of packages."""
    for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        yield Path(str(distribution.locate_file(name)))


def link(distributions: Sequence[Distribution], environment: Environment) -> None:
    """Put distributions of another environment into this one."""
    for part in {path.name: path for one in distributions for path in parts(one)}.values():
        (environment.packages / part.name).symlink_to(part)
