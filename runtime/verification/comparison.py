"""Two models on the same batches: layer by layer, output by output, and with the reference's routing."""

import numpy as np
import numpy.typing as npt

from moe_spec.cut import ForcedModel
from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.runner import LOGITS, Arrays, Feeds
from runtime.backend import Session
from runtime.inputs.random_feeds import RANDOM_SHAPES
from runtime.parity import Flags, compare_routing, selection_margin, slots_of
from runtime.verification.report import ParityReport
from runtime.verification.sides import OTHER_REFERENCE, Side, run_cast
from runtime.verification.tally import AccuracyTally, LayerTally, OutputTally
from runtime.verification.tolerances import Tolerance
from runtime.verification.verdict import first_wrong_layer, why_it_failed

_RANDOM = f"random feeds at the shapes {', '.join(f'{leading}x{other}' for leading, other, _ in RANDOM_SHAPES)}"

_NO_ROUTERS = "the {} is an engine, which shows no routers: no flips were looked for, {}"


class Comparison:
    """Both models on the same batches."""

    def __init__(
        self, reference: Side, candidate: Side, tolerance: Tolerance, routed: tuple[Session, ForcedModel] | None
    ) -> None:
        self._reference, self._candidate, self._tolerance, self._routed = reference, candidate, tolerance, routed
        self._hidden = [
            name for name, side in (("reference", reference), ("candidate", candidate)) if not side.observed
        ]
        blocks = () if self._hidden else zip(reference.manifest.blocks, candidate.manifest.blocks, strict=True)
        self._layers = [(mine, theirs, LayerTally(mine.name, tolerance)) for mine, theirs in blocks]
        self._outputs = [OutputTally(spec.name) for spec in reference.manifest.outputs]
        self._unseen = reference.manifest.blocks if self._hidden == ["candidate"] else ()
        self._of_all = [OutputTally(spec.name) for spec in reference.manifest.outputs if self._unseen]
        self._clear = 0
        self._accuracy = AccuracyTally()
        self._examples = 0

    def add(self, feeds: Feeds, labels: npt.NDArray[np.int64] | None) -> None:
        """Run one batch on both.

        Raises:
            UserError: an output of the two has another shape.
        """
        mine, theirs = (run_cast(side.session, feeds) for side in (self._reference, self._candidate))
        batch = len(next(iter(feeds.values())))
        every_B = np.ones(batch, dtype=np.bool_)
        clean_B = self._compare_layers(mine, theirs, every_B) & self._clearly_routed(mine, batch)
        for tally in self._outputs:
            self._check_shape(tally.name, mine[tally.name].shape, theirs[tally.name].shape)
            tally.add(mine[tally.name], theirs[tally.name], clean_B)
        for tally in self._of_all:
            tally.add(mine[tally.name], theirs[tally.name], every_B)
        if self._routed is not None:
            self._compare_forced(feeds, mine, *self._routed)
        logits = self._logits(mine)
        if labels is not None and logits is not None:
            self._accuracy.add(mine[logits], theirs[logits], labels)
        self._examples += batch
        self._clear += int(clean_B.sum())

    def _check_shape(self, name: str, ours: tuple[int, ...], others: tuple[int, ...]) -> None:
        if ours != others:
            raise UserError(
                f"output {name} of {self._candidate.path} is {list(others)}, that of its reference {list(ours)}",
                hint=OTHER_REFERENCE,
            )

    def _compare_layers(self, mine: Arrays, theirs: Arrays, clean_B: Flags) -> Flags:
        """Examples without a flip, which shrink from layer to layer."""
        for our_block, their_block, tally in self._layers:
            gates = [run[block.gates] for run, block in ((mine, our_block), (theirs, their_block)) if block.gates]
            if not gates:
                continue  # one expert on both sides: nothing can flip
            tokens, experts = len(gates[0]), max(our_block.keep) + 1
            routing = self._reference.routing(our_block, mine, tokens, experts)
            other = self._candidate.routing(their_block, theirs, tokens, experts)
            compared = compare_routing(routing, other, our_block.top_k)
            tally.add(compared, _per_token(clean_B, tokens), routing, other)
            clean_B = clean_B & ~_per_example(compared.flipped, len(clean_B))
        return clean_B

    def _clearly_routed(self, mine: Arrays, batch: int) -> Flags:
        """Examples that cannot flip in a candidate that hides its routers: no choice is within rounding."""
        clear_B = np.ones(batch, dtype=np.bool_)
        for block in self._unseen:
            if block.scores is not None:
                margins_T = selection_margin(mine[block.scores].astype(np.float64), block.top_k)
                clear_B &= ~_per_example(margins_T <= self._tolerance.margin, batch)
        return clear_B

    def _compare_forced(self, feeds: Feeds, mine: Arrays, session: Session, model: ForcedModel) -> None:
        """Run the candidate with the choices that the reference's routers made."""
        blocks, given = {block.name: block for block in self._reference.manifest.blocks}, dict(feeds)
        for layer in model.layers:
            block = blocks[layer.name]
            assert block.gates is not None
            own_TE = mine[block.gates][:, [block.keep.index(expert) for expert in layer.keep]]
            given.update(zip(layer.inputs, slots_of(own_TE, layer.top_k), strict=True))
        outputs = run_cast(session, given)
        for tally in self._outputs:
            tally.add_forced(mine[tally.name], outputs[tally.name])

    def _logits(self, outputs: Arrays) -> str | None:
        """The output (N, C) that classifies: `logits`, or the only one of that shape."""
        tables = [tally.name for tally in self._outputs if outputs[tally.name].ndim == 2]
        return LOGITS if LOGITS in tables else tables[0] if len(tables) == 1 else None

    def report(self, data: Dataset | None, precision: str) -> ParityReport:
        """The verdict on all batches."""
        layers = None if self._hidden else tuple(tally.report() for _, _, tally in self._layers)
        nothing_left = bool(self._unseen) and not self._clear
        outputs = tuple(tally.report() for tally in (self._of_all if nothing_left else self._outputs))
        accuracy = self._accuracy.report()
        is_forced = self._routed is not None
        reasons = why_it_failed(layers or (), outputs, accuracy, self._tolerance, forced=is_forced)
        return ParityReport(
            passed=not reasons,
            reasons=reasons,
            first_wrong_layer=first_wrong_layer(layers or (), self._tolerance) if reasons else None,
            candidate_sha256=self._candidate.sha256,
            reference_sha256=self._reference.sha256,
            data=_RANDOM if data is None else "task data",
            data_sha256=None if data is None else data.sha256,
            examples=self._examples,
            precision=precision,
            tolerance=self._tolerance,
            forced=is_forced,
            layers=layers,
            outputs=outputs,
            accuracy=accuracy,
            notes=tuple(_NO_ROUTERS.format(name, self._compared()) for name in self._hidden),
        )

    def _compared(self) -> str:
        """Which examples were, where flips could not be seen."""
        unclear = self._examples - self._clear
        if not self._unseen or not unclear:
            return "all examples were compared"
        if not self._clear:
            return "all examples were compared, in each of which rounding may choose other experts"
        return f"{unclear} of {self._examples} examples were left out, in which rounding may choose other experts"


def _per_token(clean_B: Flags, tokens: int) -> Flags:
    """Each example's flag for each of its tokens; where tokens belong to no example, all of them for all."""
    if tokens % len(clean_B):
        return np.full(tokens, clean_B.all())
    return np.repeat(clean_B, tokens // len(clean_B))


def _per_example(flags_T: Flags, batch: int) -> Flags:
    if len(flags_T) % batch:
        return np.full(batch, flags_T.any())
    return np.asarray(flags_T.reshape(batch, -1).any(axis=1))
