"""Options as the command line calls them, and what is said about those that cannot be."""

from moe_spec.errors import UserError


def flag(option: str) -> str:
    """The command line's name of ``option``.

    >>> flag("top_k")
    '--top-k'
    """
    return f"--{option.replace('_', '-')}"


def require(fits: bool, option: str, value: object, expected: str) -> None:
    """Refuse ``value`` of ``option`` unless it ``fits``.

    Raises:
        UserError: it does not.
    """
    if not fits:
        raise UserError(f"{flag(option)} {value} is out of range, expected {expected}", hint=f"give {expected}")
