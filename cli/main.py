"""The ``moe-edge`` command: one verb a file, and errors that end in an exit code."""

import errno
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console
from cli.exits import EXITS, INTERRUPTED, MISTAKE, NOT_PROVEN, USAGE
from cli.help import Verb, Verbs, help_text
from cli.help_page import limits
from cli.log import ending_logged, log_to
from cli.termination import ending_in_order
from moe_spec.errors import UserError, VerificationError
from moe_spec.files import is_full
from runtime.extras import extra_of

GROUPS = {
    "Look": ("inspect", "families", "targets", "doctor"),
    "Choose experts": ("upcycle", "calibrate", "merge", "plan", "prune", "finetune"),
    "Make what runs": ("export", "optimize", "build", "bundle"),
    "Prove and run": ("verify", "bench", "run", "report", "demo"),
}
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)
"""Each is the function of the same name in ``cli/<verb>.py``, in the order of the way through the house."""

HELP = f"""
Make Mixture-of-Experts models small enough for the device that they are for.

In each MoE layer a router gives every token K of the layer's experts; a task needs few of them. moe-edge finds out
which, drops or merges the others, exports what is left to ONNX, builds TensorRT engines, and proves that the result
computes what it should.

The whole way: calibrate, plan, export, optimize, build, verify, bench, report. `moe-edge demo` goes it once. An ONNX
file of another exporter enters at calibrate, plan or optimize. Verbs read files and write new ones; -o never
overwrites.

A checkpoint is a directory as transformers' save_pretrained writes it. A model directory is what export and optimize
write: model.onnx and manifest.json. Task data is an .npz with one array for each model input, examples on axis 0, or
with uint8 `images`; and with `labels` where accuracy counts.

Exit codes: {"; ".join(f"{code} {meaning}" for code, meaning in EXITS.items())}.

Example: moe-edge demo
Example: moe-edge plan --help
"""

_INTERRUPTED = "interrupted; nothing half-written is left"
_OF_PATHS = (errno.EIO, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS)
"""What a system says of a path that somebody gave."""
_Misuse: Any = typer.BadParameter.__base__  # click's UsageError, of which typer has its own that it gives no name


def build_app(verbs: Sequence[str] = VERBS) -> typer.Typer:
    """The typer application over ``verbs``; the docstring of a verb's file is its help."""
    app = typer.Typer(
        cls=Verbs,
        help=help_text(HELP),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def common(
        context: typer.Context,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error, for a bug report.")
        ] = False,
        _version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
        ] = False,
        log_file: Annotated[
            Path | None,
            typer.Option("--log-file", help="Add to this file what was run, when, what it said and how it ended."),
        ] = None,
    ) -> None:
        os.environ["MOE_EDGE_DEBUG"] = "1" if debug else ""
        if log_file is not None:
            log_to(log_file, context.obj)

    for group, members in GROUPS.items():
        for verb in members:
            if verb in verbs:
                module = importlib.import_module(f"cli.{verb}")
                function: Callable[..., Any] = getattr(module, verb)
                app.command(verb, cls=Verb, help=help_text(module.__doc__ or ""), rich_help_panel=group)(function)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        console.out.print(importlib.metadata.version("moe-edge"))
        raise typer.Exit


def main(arguments: Sequence[str] | None = None, verbs: Sequence[str] = VERBS) -> None:
    """Run one command; it exits with one of `cli.exits.EXITS`."""
    console.accept_any_name()
    with console.showing_warnings(), ending_logged(), ending_in_order():
        _run(list(sys.argv[1:] if arguments is None else arguments), verbs)


def _run(arguments: list[str], verbs: Sequence[str]) -> None:
    try:
        _call(arguments, verbs)
    except UserError as failure:
        console.error(failure)
        _leave(MISTAKE)
    except ModuleNotFoundError as missing:
        console.error(_not_installed(missing))
        _leave(MISTAKE)
    except VerificationError as failure:
        console.failure(failure)
        _leave(NOT_PROVEN)
    except OSError as failure:
        console.error(_mendable(failure))
        _leave(MISTAKE)
    except KeyboardInterrupt:
        console.err.print(_INTERRUPTED, soft_wrap=True)
        _leave(INTERRUPTED)


def _call(arguments: list[str], verbs: Sequence[str]) -> None:
    """Let typer run it; what typer says of its own comes in our words and exit codes."""
    try:
        code = build_app(verbs)(args=arguments, obj=arguments, prog_name="moe-edge", standalone_mode=False)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # help: rich and typer make 1 of it
            console.leave_without_reader()
        raise
    except _Misuse as misuse:
        if misuse.format_message():  # none where it was the help, for want of a verb
            console.error(_misused(misuse))
        sys.exit(USAGE)
    if code == INTERRUPTED:  # typer turns ctrl-C into this
        raise KeyboardInterrupt
    sys.exit(code)


def _misused(misuse: Any) -> UserError:
    """What the command line was given wrongly, with the closest option that there is."""
    meant = getattr(misuse, "possibilities", None)
    what = misuse.message if meant else misuse.format_message()
    found: Any = misuse.__cause__
    if hasattr(found, "errors"):  # pydantic's, which knows what was given
        flag = next(name for name in misuse.param.opts if name.startswith("--"))
        expected = ", ".join([misuse.param.display_type(None), *limits(misuse.param)])
        what = f"{flag} is {found.errors()[0]['input']!r}, expected {expected}"
    ask = f"{misuse.ctx.command_path} --help"
    hint = f"did you mean {meant[0]}? {ask}" if meant else ask
    return UserError(f"{what[0].lower()}{what[1:].rstrip('.')}", hint=hint)


def _mendable(failure: OSError) -> UserError:
    """What the system says of a file or of stdout; where it says nothing of the kind, the failure is a bug."""
    if is_full(failure):
        console.drop_output()
        hint = "make room where it goes, or let it go elsewhere"
        return UserError(f"what was found cannot be written: {failure.strerror}", hint=hint)
    if isinstance(failure, PermissionError) and failure.filename is not None:
        hint = f"who may read and write it: ls -ld {failure.filename}"
        return UserError(f"{failure.filename}: {failure.strerror}", hint=hint)
    if failure.errno in _OF_PATHS and failure.filename is not None:
        return UserError(f"{failure.filename}: {failure.strerror}", hint="check the path, or give another one")
    raise failure


def _not_installed(missing: ModuleNotFoundError) -> UserError:
    extra = extra_of(missing.name or "")
    if extra is None:
        raise missing
    return UserError(f"this needs {missing.name}, which is not installed", hint=f"pip install 'moe-edge[{extra}]'")


def _leave(code: int) -> None:
    if os.environ.get("MOE_EDGE_DEBUG"):
        raise  # the error being handled, with its traceback
    sys.exit(code)
