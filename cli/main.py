"""The ``moe-edge`` command: one verb a file, and errors that end in an exit code."""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from cli import console
from moe_spec.errors import UserError, VerificationError
from moe_spec.files import is_full
from runtime.extras import extra_of

VERBS = (
    "inspect",
    "families",
    "targets",
    "upcycle",
    "calibrate",
    "merge",
    "plan",
    "prune",
    "finetune",
    "export",
    "optimize",
    "build",
    "bundle",
    "verify",
    "bench",
    "run",
    "demo",
    "doctor",
)
"""Each is the function of the same name in ``cli/<verb>.py``, in the order of the way through the house."""

EXIT_USER, EXIT_VERIFICATION, EXIT_INTERRUPTED = 1, 3, 130
_INTERRUPTED = "interrupted; nothing half-written is left"


def build_app(verbs: Sequence[str] = VERBS) -> typer.Typer:
    """The typer application over ``verbs``; the docstring of a verb's file is its help."""
    app = typer.Typer(
        help="Prune Mixture-of-Experts models, export them to ONNX, build engines, and prove what was done.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def common(
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
        _version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
        ] = False,
    ) -> None:
        os.environ["MOE_EDGE_DEBUG"] = "1" if debug else ""

    for verb in verbs:
        module = importlib.import_module(f"cli.{verb}")
        function: Callable[..., Any] = getattr(module, verb)
        app.command(verb, help=console.plain(module.__doc__ or ""))(function)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        console.out.print(importlib.metadata.version("moe-edge"))
        raise typer.Exit


def main(arguments: Sequence[str] | None = None, verbs: Sequence[str] = VERBS) -> None:
    """Run one command.

    It exits with 0 done, 1 the user can mend it, 2 usage, 3 verification failed, 130 interrupted, 141 nobody reads on.
    """
    console.show_warnings()
    try:
        build_app(verbs)(args=list(arguments) if arguments is not None else None, standalone_mode=True)
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:  # typer turns ctrl-C into this
            console.err.print(_INTERRUPTED)
        raise
    except UserError as failure:
        console.error(failure)
        _leave(EXIT_USER)
    except ModuleNotFoundError as missing:
        console.error(_not_installed(missing))
        _leave(EXIT_USER)
    except VerificationError as failure:
        console.failure(failure)
        _leave(EXIT_VERIFICATION)
    except OSError as failure:
        if not is_full(failure):
            raise
        console.drop_output()
        hint = "make room where it goes, or let it go elsewhere"
        console.error(UserError(f"what was found cannot be written: {failure.strerror}", hint=hint))
        _leave(EXIT_USER)
    except KeyboardInterrupt:
        console.err.print(_INTERRUPTED)
        _leave(EXIT_INTERRUPTED)


def _not_installed(missing: ModuleNotFoundError) -> UserError:
    extra = extra_of(missing.name or "")
    if extra is None:
        raise missing
    return UserError(f"this needs {missing.name}, which is not installed", hint=f"pip install 'moe-edge[{extra}]'")


def _leave(code: int) -> None:
    if os.environ.get("MOE_EDGE_DEBUG"):
        raise  # the error being handled, with its traceback
    sys.exit(code)
