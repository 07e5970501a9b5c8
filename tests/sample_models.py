"""The models that samples hand to `moe-edge build`, and decoders of every kind of cache, exported and planned."""

import dataclasses
import json
import runpy
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from exporter.export import export
from graph_passes.describe import read_model
from models.vmoe.assets import fashion_mnist
from moe_spec.layer_plan import FULL, MEAN, ROWS, LayerPlan, Merge
from moe_spec.plan import PruningPlan
from tests.decoders import DECODERS
from tests.zoo import RUNNER, Zoo

SAMPLES = Path(__file__).parents[1] / "samples"

FOUR, SIX, ONE = (0, 1, 4, 6), (0, 1, 2, 4, 5, 6), (2,)
PAIRS = tuple(Merge((survivor, survivor + 1), (1.0, 3.0)) for survivor in (0, 2, 4, 6))


@dataclasses.dataclass(frozen=True)
class SampleModel:
    """A model before it is pruned, and what becomes of each of its layers of eight experts.

    Attributes:
        sample: those that make it so; none does where it is empty.
        make: exports it into a directory.
        keep: the experts that stay.
        router: as in a plan.
        merge: likewise.
    """

    sample: str
    make: Callable[[Zoo], Path]
    keep: tuple[int, ...] = FOUR
    router: str = ROWS
    merge: tuple[Merge, ...] = ()

    def plan(self, exported: Path) -> PruningPlan:
        """The plan for that directory; K is that of the model where as many experts stay, else their number."""
        model = read_model(exported)
        layers = tuple(
            LayerPlan(
                block.name,
                block.num_experts,
                min(block.router.top_k, len(self.keep)),
                self.keep,
                groups=block.router.groups,
                router=self.router,
                merge=self.merge,
            )
            for block in model.blocks
        )
        return PruningPlan(model.model_sha256, "by hand", layers)


def _embedded(zoo: Zoo) -> Path:
    return zoo.once("embedded.exported", lambda path: export(fashion_mnist(), path, RUNNER))


def _one_expert_a_token(zoo: Zoo) -> Path:
    def make(path: Path) -> None:
        checkpoint = shutil.copytree(fashion_mnist(), path.with_suffix(".checkpoint"))
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
        export(checkpoint, path, RUNNER)

    return zoo.once("embedded-top-1.exported", make)


def _foreign(zoo: Zoo) -> Path:
    script = runpy.run_path(str(SAMPLES / "02_prune_a_foreign_onnx_file" / "export_foreign.py"))

    def make(path: Path) -> None:
        with warnings.catch_warnings(action="ignore"):  # torch.onnx calls what torch deprecates
            script["export_transformer"](fashion_mnist(), path)

    return zoo.once("embedded.foreign", make)


SAMPLE_MODELS: Mapping[str, SampleModel] = {
    "pruned": SampleModel("01, 08, 09, 10, demo", _embedded),
    "foreign": SampleModel("02", _foreign),
    "one expert": SampleModel("03, demo", _embedded, ONE),
    "top-1": SampleModel("04", _one_expert_a_token, SIX),
    "merged": SampleModel("05", _embedded, tuple(merge.experts[0] for merge in PAIRS), MEAN, PAIRS),
    "full router": SampleModel("06", _embedded, router=FULL),
}
"""All of them the embedded V-MoE. What sample 07 makes is a Mixtral with its cache, in `CACHED`."""

CACHED: Mapping[str, SampleModel] = {
    name: SampleModel("07, in small" if name == "mixtral" else "", partial(Zoo.cached, name=name)) for name in DECODERS
}
