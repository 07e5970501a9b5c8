"""The two things a user hears about: a mistake that they can mend, and a proof that failed."""

from __future__ import annotations  # Python 3.8: this file travels to devices, see runtime/bundle

import difflib
from collections.abc import Collection, Iterable


class UserError(Exception):
    """Something the user can mend. The command line prints ``error: what`` and ``hint: hint``, and exits with 1.

    ``what`` says where, what was found and what was expected; ``hint`` is the command or edit that mends it.

    >>> print(UserError("plan.json is empty", hint="run `moe-edge plan` again"))
    plan.json is empty
    hint: run `moe-edge plan` again
    """

    def __init__(self, what: str, *, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\nhint: {self.hint}"


class VerificationError(Exception):
    """A candidate does not compute what it should. The command line prints it and exits with 3."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word, or all of them.

    >>> did_you_mean("freqency", ["frequency", "reap"])
    "did you mean 'frequency'? known: frequency, reap"
    >>> did_you_mean("x", ["frequency", "reap"])
    'known: frequency, reap'
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    everything = f"known: {', '.join(names)}"
    return f"did you mean {close[0]!r}? {everything}" if close else everything


def require_known(name: str, what: str, known: Collection[str]) -> None:
    """Refuse a name that is none of ``known``, each a ``what``.

    Raises:
        UserError: with the closest known name.
    """
    if name not in known:
        raise UserError(f"{name!r} is no {what}", hint=did_you_mean(name, known))
