import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from runtime.onnxruntime.session import OnnxRuntimeSession
from tests.cli.helpers import done, invoke
from tests.cli.interrupt import ctrl_c
from tests.runtime import tiny


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def save(path, count):
    np.savez(path, x=tiny.examples(count))
    return path


def test_classes_are_printed_with_their_probabilities(model, tmp_path):
    code, out, _ = invoke("run", model, "--input", save(tmp_path / "a.npz", 2))
    assert code == 0
    first, *rest = out.splitlines()
    assert first == "2 examples: logits [2, 3]"
    assert [line.split(":")[0] for line in rest] == [f"  {tmp_path}/a.npz[0]", f"  {tmp_path}/a.npz[1]"]


def test_a_long_list_is_cut_for_people_only(model, tmp_path):
    arguments = ("run", model, "--input", save(tmp_path / "a.npz", 25))
    assert invoke(*arguments)[1].splitlines()[-1] == "  and 5 more (--json shows all)"
    examples = json.loads(invoke(*arguments, "--json")[1])["examples"]
    assert len(examples) == 25
    assert {"name", "class", "probability"} == set(examples[0])


def test_outputs_are_written(model, tmp_path):
    out = tmp_path / "out.npz"
    code, text, _ = invoke("run", model, "--input", save(tmp_path / "a.npz", 2), "-o", out)
    assert (code, text.splitlines()[0]) == (0, f"2 examples: logits [2, 3], written to {out}")
    assert np.load(out)["logits"].shape == (2, 3)


def test_broken_input_is_named(model, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK no zip")
    code, _, err = invoke("run", model, "--input", tmp_path / "a.npz")
    assert code == 1
    assert err.endswith(
        f"error: {tmp_path}/a.npz is no readable .npz: File is not a zip file\n"
        "hint: write it with numpy.savez_compressed; pickled objects are never read\n"
    )


def test_ctrl_c_leaves_no_output(model, tmp_path):
    source = save(tmp_path / "a.npz", 200_000)
    before = sorted(tmp_path.iterdir())
    with ctrl_c():
        code, out, _ = invoke("run", model, "--input", source, "--batch-size", 1, "-o", tmp_path / "out.npz")
    assert (code, out, sorted(tmp_path.iterdir())) == (130, "", before)


def test_a_decoder_goes_on_from_a_prompt(zoo):
    prompted = ("run", zoo.cached("mixtral"), "--prompt", "w5 w77 w9", "--max-new-tokens", 6)
    text = done(*prompted)
    assert re.fullmatch(r"(w\d+ ){5}w\d+\n", text)
    (found,) = json.loads(done(*prompted, "--json"))["answers"]
    assert (found["prompt"], found["text"], len(found["tokens"])) == ("w5 w77 w9", text.strip(), 6)
    assert not found["ended"]


def test_prompts_are_answered_together_each_by_itself(zoo):
    texts = ("w5 w77 w9", "w8")
    both = [argument for text in texts for argument in ("--prompt", text)]
    lines = done("run", zoo.cached("mixtral"), *both, "--max-new-tokens", 6).splitlines()
    alone = [done("run", zoo.cached("mixtral"), "--prompt", text, "--max-new-tokens", 6) for text in texts]
    assert lines == [f"{text!r}: {answer.strip()}" for text, answer in zip(texts, alone, strict=True)]


def test_a_chat_is_another_prompt(zoo):
    options = ("--prompt", "w5 w77", "--max-new-tokens", 6)
    plain, chat = (done("run", zoo.cached("mixtral"), *options, *more) for more in ((), ("--chat",)))
    written_out = done("run", zoo.cached("mixtral"), "--prompt", "<s> w5 w77 w9", "--max-new-tokens", 6)
    assert chat == written_out != plain


def test_an_answer_ends_where_the_model_ends_it(zoo, tmp_path):
    model = shutil.copytree(zoo.cached("mixtral"), tmp_path / "model")
    options = ("run", model, "--prompt", "w5 w77 w9", "--max-new-tokens", 6, "--json")
    (free,) = json.loads(done(*options))["answers"]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": free["tokens"][2]}))
    (ended,) = json.loads(done(*options))["answers"]
    first = free["tokens"].index(free["tokens"][2]) + 1
    assert (ended["tokens"], ended["ended"]) == (free["tokens"][:first], True)


def test_an_answer_ends_before_a_stop_text_each_by_itself(zoo):
    prompts = ("--prompt", "w5 w77 w9", "--prompt", "w8")
    options = ("run", zoo.cached("mixtral"), "--max-new-tokens", 8)
    free = json.loads(done(*options, *prompts, "--json"))["answers"]
    stop = " ".join(free[0]["text"].split()[2:4])
    texts = [found["text"].split(stop)[0] for found in free]
    stopped = json.loads(done(*options, *prompts, "--stop", stop, "--stop", "w0", "--json"))["answers"]
    assert [found["text"] for found in stopped] == texts
    assert [found["ended"] for found in stopped] == [stop in found["text"] for found in free]
    assert (stopped[0]["ended"], len(stopped[0]["tokens"])) == (True, 4)
    assert done(*options, *prompts[:2], "--stop", stop) == texts[0] + "\n"  # as it is shown while it comes


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), "there is nothing to run"),
        (("--prompt", "w5", "--input", "a.npz"), "files and prompts cannot be run at once"),
    ],
)
def test_files_or_prompts_are_needed(arguments, what, model):
    message = f"error: {what}\nhint: give files with --input, or texts with --prompt\n"
    assert invoke("run", model, *arguments) == (1, "", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--input", "a.npz", "--stop", "END", "--temperature", 0, "--top-p", 0.5, "--seed", 0, "--chat"),
            "--chat, --seed, --stop, --temperature, --top-p go with --prompt, not with --input\n"
            "hint: leave out what does not go with --input",
        ),
        (
            ("--input", "a.npz", "--max-new-tokens", 4),
            "--max-new-tokens go with --prompt, not with --input\nhint: leave out what does not go with --input",
        ),
        (
            ("--prompt", "w5", "-o", "out.npz", "--batch-size", 32),
            "--batch-size, --output go with --input, not with --prompt\nhint: leave out what does not go with --prompt",
        ),
        (
            ("--input", "a.npz", "--provider", "cudda"),
            "'cudda' is no execution provider\n"
            "hint: did you mean 'cuda'? known: coreml, cpu, cuda, directml, openvino, qnn, tensorrt, tensorrt-rtx",
        ),
        (
            ("--input", "a.npz", "--provider", "directml", "--provider-option", "device=1"),
            "'device' is no option of the provider directml\nhint: did you mean 'device_id'? known: device_id",
        ),
        (
            ("--input", "a.npz", "--provider-option", "device_id"),
            "the provider option 'device_id' has no value\nhint: give each once, as NAME=VALUE",
        ),
    ],
)
def test_options_that_make_no_sense_together_are_refused(arguments, message, model):
    assert invoke("run", model, *arguments) == (1, "", f"error: {message}\n")


def test_a_seed_is_a_natural_number():
    code, out, err = invoke("run", "decoder", "--prompt", "w5", "--seed", -1)
    assert (code, out) == (2, "")
    assert "--seed" in err


def test_what_runs_it_changes_no_answer(model, tmp_path):
    data = save(tmp_path / "a.npz", 3)
    expected = done("run", model, "--input", data)
    cache = ("--cache", tmp_path / "cache")
    for options in (("--provider", "cpu", "--threads", 1), ("--parallel", 2, "--no-spinning"), cache, cache):
        assert invoke("run", model, "--input", data, *options) == (0, expected, "")
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "model.onnx").write_bytes(b"")
    code, out, err = invoke("run", model, "--input", data, *cache)
    assert (code, out) == (0, expected)
    assert err == f"warning: {entry} is damaged (model.onnx changed): it is made again\n"


class Reader(threading.Thread):
    """Reads a little of a pipe, as `head` does, and goes."""

    def __init__(self, descriptor, size):
        super().__init__()
        self.descriptor, self.size, self.read = descriptor, size, b""

    def run(self):
        while len(self.read) < self.size:
            self.read += os.read(self.descriptor, self.size - len(self.read))
        os.close(self.descriptor)


def open_sessions():
    gc.collect()
    return sum(type(thing) is OnnxRuntimeSession for thing in gc.get_objects())


def piped(size, *arguments):
    """Exit code of a command and what was read of it, by a reader that goes after ``size`` bytes."""
    source, sink = os.pipe()
    reader = Reader(source, size)
    reader.start()
    with os.fdopen(sink, "w") as stdout, contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as leaving:
        main([*map(str, arguments)], verbs=[str(arguments[0])])
    reader.join()
    return leaving.value.code, reader.read


def test_a_reader_that_goes_ends_the_answer_in_order(zoo, capfd):
    """It is found out at the first token that nobody takes, and the session is let go."""
    alive = open_sessions()
    prompted = ("run", zoo.cached("mixtral"), "--prompt", "w5 w77 w9", "--max-new-tokens", 100_000)
    assert piped(3, *prompted)[0] == 141
    assert open_sessions() <= alive
    assert capfd.readouterr() == ("", "")


def test_a_reader_that_goes_before_the_result_ends_it_in_order(model, tmp_path, capfd):
    data = save(tmp_path / "a.npz", 8000)  # more lines than a pipe holds
    assert piped(1, "run", model, "--input", data, "--json")[0] == 141
    assert capfd.readouterr() == ("", "")


def test_a_reader_that_goes_before_a_table_ends_it_in_order(capfd):
    """Of any verb: rich writes it."""
    source, sink = os.pipe()
    os.close(source)
    with os.fdopen(sink, "w") as stdout, contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as leaving:
        main(["targets"], verbs=["targets"])
    assert (leaving.value.code, capfd.readouterr()) == (141, ("", ""))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("verb", ["run", "targets"])
def test_a_full_disk_behind_stdout_is_an_error(verb, model, tmp_path, capfd):
    """Of what is written word by word, and of rich's tables."""
    arguments = (model, "--input", save(tmp_path / "a.npz", 2), "--json") if verb == "run" else ()
    with open("/dev/full", "w") as stdout, contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as leaving:  # noqa: PTH123 - a device
        main([verb, *map(str, arguments)], verbs=[verb])
    assert (leaving.value.code, *capfd.readouterr()) == (
        1,
        "",
        "error: what was found cannot be written: No space left on device\n"
        "hint: make room where it goes, or let it go elsewhere\n",
    )


def test_head_takes_the_first_words_of_an_answer(zoo):
    """As in a shell: the tool ends by itself, without a word."""
    code = "import sys; from cli.main import main; main(sys.argv[1:], verbs=['run'])"
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
        "run",
        zoo.cached("mixtral"),
        "--prompt",
        "w5",
        "--max-new-tokens",
        "100000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tool:
        assert tool.stdout is not None
        assert tool.stderr is not None
        head = subprocess.run(["head", "-c", "2"], stdin=tool.stdout, stdout=subprocess.PIPE, check=True)
        tool.stdout.close()
        assert (tool.stderr.read(), tool.wait(timeout=60), len(head.stdout)) == (b"", 141, 2)
