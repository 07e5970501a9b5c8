"""bench.json: what `bench` measured, and of which models."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from moe_spec.files import sha256_file
from moe_spec.manifest import FILE_NAME
from moe_spec.record import load_record, save_record
from runtime.bench import BenchRow

SCHEMA = 1
_REMAKE = "make it again with `moe-edge bench MODEL... -o bench.json`"


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """What models cost, timed in turns.

    Attributes:
        rows: one for each model, batch size and phase.
        models: by ``BenchRow.model``, hash of the model's manifest.json; what has no manifest is left out.
    """

    rows: tuple[BenchRow, ...]
    models: Mapping[str, str]

    @classmethod
    def of(cls, rows: Iterable[BenchRow]) -> "BenchReport":
        """The rows as `bench` gave them, whose models are where they were."""
        rows = tuple(rows)
        manifests = {row.model: Path(row.model) / FILE_NAME for row in rows}
        return cls(rows, {model: sha256_file(path) for model, path in manifests.items() if path.is_file()})

    def save(self, path: Path) -> None:
        """Write bench.json."""
        save_record(path, "bench", SCHEMA, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "BenchReport":
        """Read bench.json.

        Raises:
            UserError: the file is missing, cut, another artifact, or of another schema.
        """
        record = load_record(path, "bench", SCHEMA, _REMAKE)
        models = record.record("models")
        if models is None:
            raise record.fail("key 'models' is missing")
        hashes = {name: models.take(name, str) for name in record.take("models", dict)}
        return cls(tuple(row.row(BenchRow) for row in record.records("rows")), hashes)
