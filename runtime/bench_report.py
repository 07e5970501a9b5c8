"""bench.json: what `bench` measured, and of which models."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from moe_spec.files import sha256_file
from moe_spec.manifest import FILE_NAME
from moe_spec.record import Json, load_record, save_record
from runtime.bench import BenchRow
from runtime.measuring.machine import describe_machine

SCHEMA = 1
_REMAKE = "make it again with `moe-edge bench MODEL... -o bench.json`"


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """What models cost, timed in turns.

    Attributes:
        rows: one for each model, batch size and phase.
        models: by ``BenchRow.model``, hash of the model's manifest.json; what has no manifest is left out.
        machine: where it was: cores, processor, system, versions of what computes.
        threads: that one operator was allowed; 0 for one a core.
        cores: numbers of those that all were kept to; empty for any.
        notes: what the rows do not say.
    """

    rows: tuple[BenchRow, ...]
    models: Mapping[str, str]
    machine: str = ""
    threads: int = 0
    cores: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, rows: Iterable[BenchRow], threads: int = 0, cores: Iterable[int] = (), notes: Iterable[str] = ()
    ) -> "BenchReport":
        """The rows as `bench` gave them on this machine, whose models are where they were."""
        rows = tuple(rows)
        manifests = {row.model: Path(row.model) / FILE_NAME for row in rows}
        models = {model: sha256_file(path) for model, path in manifests.items() if path.is_file()}
        return cls(rows, models, describe_machine(), threads, tuple(cores), tuple(notes))

    def to_json(self) -> Json:
        """The report as it stands in bench.json."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write bench.json."""
        save_record(path, "bench", SCHEMA, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "BenchReport":
        """Read bench.json.

        Raises:
            UserError: the file is missing, cut, another artifact, or of another schema.
        """
        record = load_record(path, "bench", SCHEMA, _REMAKE)
        models = record.required("models")
        hashes = {name: models.take(name, str) for name in record.take("models", dict)}
        return cls(
            rows=tuple(row.row(BenchRow) for row in record.records("rows")),
            models=hashes,
            machine=record.take("machine", str),
            threads=record.take("threads", int),
            cores=record.items("cores", int),
            notes=record.items("notes", str),
        )
