import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_spec.errors import UserError
from moe_spec.files import (
    inside,
    new_directory,
    new_file,
    refuse_existing,
    require_file,
    sha256_file,
    sha256_files,
    sha256_text,
)
from tests.heard import Heard


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_a_directory_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_directory(out) as staging:
        (staging / "model").write_text("weights")
        assert not out.exists()
    assert (out / "model").read_text() == "weights"
    assert names(out.parent) == {"out"}
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_directory_that_fails_leaves_nothing(failure, tmp_path):
    def write():
        with new_directory(tmp_path / "out") as staging:
            (staging / "model").write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert names(tmp_path) == set()


def test_an_existing_directory_is_never_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=re.escape(f"{out} already exists")) as caught, new_directory(out):
        pytest.fail("no work starts")
    assert caught.value.hint == f"give another -o, or remove it first: rm -r {out}"


def test_a_directory_that_appears_meanwhile_is_never_overwritten(tmp_path):
    out = tmp_path / "out"

    def write():
        with new_directory(out):
            out.mkdir()
            (out / "theirs").touch()

    with pytest.raises(UserError, match="already exists"):
        write()
    assert names(tmp_path) == {"out"}
    assert names(out) == {"theirs"}


KILLED = """
import os, pathlib, signal, sys
from moe_spec.files import new_directory
with new_directory(pathlib.Path(sys.argv[1])) as staging:
    (staging / "model").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="directories cannot be locked")
def test_what_a_killed_run_left_goes_with_the_next(tmp_path):
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, out]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / ".out.settings").mkdir()  # a user's own
    with new_directory(tmp_path / "another"):
        assert left.exists()
    with new_directory(out) as staging:
        assert names(tmp_path) == {staging.name, "another", ".out.settings"}


def test_what_another_run_is_writing_stays(tmp_path):
    def write():
        with new_directory(tmp_path / "out") as slow, new_directory(tmp_path / "out"):
            assert slow.exists()

    with pytest.raises(UserError, match="already exists"):
        write()
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_file_that_fails_leaves_the_old_one(failure, tmp_path):
    out = tmp_path / "plan.json"
    out.write_text("old")

    def write():
        with new_file(out) as staging:
            staging.write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert names(tmp_path) == {"plan.json"}
    assert out.read_text() == "old"


def test_a_file_replaces_the_old_one_in_one_step(tmp_path):
    out = tmp_path / "plan.json"
    out.write_text("old")
    with new_file(out) as staging:
        staging.write_text("new")
        assert (staging.parent, staging.suffix) == (tmp_path, ".json")
        assert out.read_text() == "old"
    assert out.read_text() == "new"
    assert out.stat().st_mode & 0o777 == 0o644


def test_a_directory_that_appears_at_the_last_moment_is_never_overwritten(tmp_path, monkeypatch):
    rename = Path.rename

    def later(staging, path):
        path.mkdir()
        (path / "of another run").touch()
        return rename(staging, path)

    monkeypatch.setattr(Path, "rename", later)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/out already exists")), new_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "of another run"]


def test_a_dangling_link_exists_too(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already exists"):
        refuse_existing(tmp_path / "link")
    refuse_existing(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", "sub/../../elsewhere", "link/elsewhere"])
def test_a_model_names_no_file_outside_its_directory(name, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "link").symlink_to(tmp_path)
    with pytest.raises(UserError) as caught:
        inside(model, name, model / "model.onnx")
    assert caught.value.what == f"{model / 'model.onnx'} names the file {name!r}, which lies outside {model}"


def test_a_file_is_required(tmp_path):
    (tmp_path / "there").touch()
    assert require_file(tmp_path / "there", "a plan") == tmp_path / "there"
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} is a directory, expected a plan")):
        require_file(tmp_path, "a plan")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'gone'} does not exist, expected a plan")):
        require_file(tmp_path / "gone", "a plan")


def test_a_file_that_is_not_there_has_a_name_like_one_that_is(tmp_path):
    for name in ("plan.json", "plan.txt", "other.json"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        require_file(tmp_path / "plans.json", "a plan")
    assert error.value.what == f"{tmp_path}/plans.json does not exist, expected a plan"
    assert error.value.hint == f"did you mean {tmp_path}/plan.json?"
    for far in (tmp_path / "statistics.json", tmp_path / "nowhere" / "plan.json", tmp_path / "plan.txt" / "plan.json"):
        with pytest.raises(UserError) as error:
            require_file(far, "a plan")
        assert error.value.hint == "check the path"


def test_a_file_and_its_text_have_one_hash(tmp_path):
    path = tmp_path / "text"
    path.write_text("moe" * 1_000_000)
    assert sha256_file(path) == sha256_text("moe" * 1_000_000)


def test_progress_counts_the_bytes_of_all_files_that_are_hashed(tmp_path):
    heard, paths = Heard(), [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        path.write_bytes(b"moe" * 500_000)
    assert sha256_files(paths, heard) == [sha256_file(paths[0])] * 2
    first, more, whole = 1 << 20, 1_500_000, 3_000_000
    counts = heard.counts("hashing files")
    assert counts == [(done, whole) for done in (0, first, more, more + first, whole)]
