"""JSON artifacts: sorted, indented, diffable; read back with an error that names the file, the key and the mend."""

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from moe_spec.errors import UserError
from moe_spec.files import new_file, require_file

Json = dict[str, Any]
T = TypeVar("T")

_MISSING = object()

_LIST_OF_NUMBERS = re.compile(r"\[\n\s*([\d.e+-]+(?:,\n\s*[\d.e+-]+)*)\n\s*\]")
"""Kept on one line; a JSON string holds no line break, so nothing else matches. Two numbers are never adjacent without
a comma: otherwise a list that is no list of numbers would be tried in exponentially many ways."""


class Record:
    """One JSON object of an artifact, whose values are taken by key and type."""

    def __init__(self, values: Mapping[str, Any], where: str, remake: str) -> None:
        self._values = values
        self.where = where
        self._remake = remake

    def fail(self, what: str) -> UserError:
        """The error for this record, with the command that makes the artifact anew."""
        return UserError(f"{self.where}: {what}", hint=self._remake)

    def take(self, key: str, kind: type[T], default: Any = _MISSING) -> T:
        """The value at ``key``; an int passes for a float.

        Raises:
            UserError: the key is missing (and has no default) or holds another type.
        """
        value = self._values.get(key, default)
        if value is _MISSING:
            raise self.fail(f"key {key!r} is missing")
        return value if value is default else self._typed(key, value, kind)

    def _typed(self, key: str, value: Any, kind: type[T]) -> T:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        raise self.fail(f"key {key!r} holds {value!r}, expected {kind.__name__}")

    def records(self, key: str) -> list["Record"]:
        """The JSON objects listed at ``key``."""
        return [self._child(value, f"{key}[{index}]") for index, value in enumerate(self.take(key, list))]

    def record(self, key: str) -> "Record | None":
        """The JSON object at ``key``, or None where it is null or missing."""
        value = self.take(key, dict, default=None)
        return None if value is None else self._child(value, key)

    def required(self, key: str) -> "Record":
        """The JSON object at ``key``.

        Raises:
            UserError: it is null, missing or something else.
        """
        found = self.record(key)
        if found is None:
            raise self.fail(f"key {key!r} is missing")
        return found

    def _child(self, value: Any, key: str) -> "Record":
        if not isinstance(value, dict):
            raise self.fail(f"{key} holds {value!r}, expected an object")
        return Record(value, f"{self.where}: {key}", self._remake)

    def items(self, key: str, kind: type[T]) -> tuple[T, ...]:
        """The list at ``key``, every item of type ``kind``; an int passes for a float."""
        return tuple(self._typed(key, value, kind) for value in self.take(key, list))

    def row(self, kind: type[T]) -> T:
        """A dataclass of plain fields: str, int, float or bool, one of these or None, or a tuple of one of these.

        Raises:
            UserError: a key is missing, unless its field may be None, or holds another type.
        """
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]
        return kind(**{field.name: self._field(field.name, field.type) for field in fields})

    def _field(self, key: str, kind: Any) -> Any:
        if isinstance(kind, type) and not typing.get_origin(kind):
            return self.take(key, kind)
        (wanted,) = (one for one in typing.get_args(kind) if one not in (type(None), ...))
        return self.items(key, wanted) if typing.get_origin(kind) is tuple else self.take(key, wanted, default=None)


def dump(payload: Mapping[str, Any]) -> str:
    """The one text form of an artifact.

    >>> print(dump({"b": 1, "a": [1, 2]}))
    {
     "a": [1, 2],
     "b": 1
    }
    """
    text = json.dumps(payload, indent=1, sort_keys=True, allow_nan=False)
    return _LIST_OF_NUMBERS.sub(lambda match: "[" + ", ".join(re.split(r",\s*", match.group(1))) + "]", text)


def dump_record(artifact: str, schema: int, payload: Mapping[str, Any]) -> str:
    """The text of artifact ``artifact`` in schema ``schema``."""
    return dump({**payload, "artifact": artifact, "schema": schema})


def save_record(path: Path, artifact: str, schema: int, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` as artifact ``artifact``; a killed run leaves the old file."""
    with new_file(path) as staging:
        staging.write_text(dump_record(artifact, schema, payload) + "\n", encoding="utf-8")


def load_record(path: Path, artifact: str, schema: int, remake: str) -> Record:
    """Read artifact ``artifact`` in schema ``schema``; ``remake`` is the hint of every error.

    Raises:
        UserError: the file is missing, cut, no JSON, another artifact, or of another schema.
    """
    require_file(path, f"a {artifact} (JSON)")
    return parse_record(path, path.read_bytes(), artifact, schema, remake)


def parse_record(path: Path, text: str | bytes, artifact: str, schema: int, remake: str) -> Record:
    """What ``dump_record`` wrote; ``path`` is where it was found.

    Raises:
        UserError: no JSON, another artifact, or another schema; a newer one asks for a newer moe-edge.
    """
    values = parse_object(path, text, remake)
    if values.get("artifact") != artifact:
        says = f"is a {values['artifact']}" if "artifact" in values else "does not say what it is"
        raise UserError(f"{path} {says}, expected a {artifact}", hint=remake)
    found = values.get("schema")
    if found != schema:
        mend = "update moe-edge, or " if isinstance(found, int) and found > schema else ""
        raise UserError(f"{path} has {artifact} schema {found!r}, this moe-edge reads {schema}", hint=f"{mend}{remake}")
    return Record(values, str(path), remake)


def parse_object(path: Path | str, text: str | bytes, remake: str) -> Json:
    """The JSON object in ``text``; ``path`` is where it was found.

    Raises:
        UserError: cut, no JSON, nested too deep, or no object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no text at all, or brackets without end
        raise UserError(f"{path} is no complete JSON: {error}", hint=remake) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a JSON object", hint=remake)
    return values
