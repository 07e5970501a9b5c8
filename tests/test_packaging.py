"""What is published is what is in the repository: nothing is left out of the wheel, nothing else is in it."""

import tarfile
import tomllib
import zipfile

from tests.installed import BESIDE, PACKAGES, ROOT

DATA = (
    "models/support.json",
    "models/vmoe/fashion_mnist/README.md",  # the licences of the weights and of the images
    "models/vmoe/fashion_mnist/model.safetensors",
    "models/vmoe/fashion_mnist/test.npz",
    "runtime/bundle/device/verify.py",
    *(f"{package}/py.typed" for package in PACKAGES),
)


def sources(folder):
    return {path.relative_to(folder).as_posix() for name in PACKAGES for path in (folder / name).rglob("*.*")}


def test_the_wheel_holds_every_file_of_the_packages_and_the_licence(package):
    (wheel,) = (package / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {name for name in names if ".dist-info/" not in name}
    assert own == sources(package)
    assert own >= set(DATA)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_them_too_and_how_to_cite_it(package):
    (archive,) = (package / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert names >= sources(package) | set(BESIDE)


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
    assert {f"version: {project['version']}", f"license: {project['license']}", f"title: {project['name']}"} <= set(
        lines
    )
