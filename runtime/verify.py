"""Does a candidate compute what its reference computes? Knows that an MoE's routers may flip.

Element-wise error on an MoE is dominated by tokens that select other experts, so three things are looked at apart:
which experts are selected, and whether rounding explains each difference; the outputs of examples on which nothing
flipped; and measures over everything (cosine, KL, top-1 agreement, task accuracy).
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_spec.cut import ForcedModel
from moe_spec.dataset import Dataset
from moe_spec.decoder import has_cache
from moe_spec.progress import Progress, counted, silent
from moe_spec.runner import LOGITS, Arrays, Feeds
from runtime.backend import Session
from runtime.backends import open_session
from runtime.inputs.feeds import RANDOM_SHAPES, RandomFeeds
from runtime.parity import Flags, compare_routing, slots_of
from runtime.providers import BY_DEFAULT, Execution
from runtime.text.greedy import PROMPTS, compare_greedy, prompts_of
from runtime.verification.report import ParityReport
from runtime.verification.sides import Side, batches_of, check_comparable, count_batches, run_cast
from runtime.verification.tally import AccuracyTally, LayerTally, OutputTally
from runtime.verification.tolerances import TOLERANCES, Tolerance
from runtime.verification.verdict import first_wrong_layer, why_it_failed

_RANDOM = f"random feeds at the shapes {', '.join(f'{leading}x{other}' for leading, other, _ in RANDOM_SHAPES)}"
GREEDY_TOKENS = 16
PROMPT_TOKENS = 8
"""Of prompts that are drawn at random."""

_NO_ROUTERS = "the {} is an engine, which shows no routers: no flips were looked for, all examples were compared"


def verify(
    candidate: Path | Side,
    reference: Path | Side,
    data: Dataset | None = None,
    *,
    batch_size: int = 32,
    threads: int = 0,
    execution: Execution = BY_DEFAULT,
    tolerance: Tolerance | None = None,
    tolerances: Mapping[str, Tolerance] = TOLERANCES,
    forced: ForcedModel | None = None,
    greedy_tokens: int = GREEDY_TOKENS,
    on_progress: Progress = silent,
) -> ParityReport:
    """Compare two models, each a model or engine directory or whatever else runs, such as a checkpoint in torch.

    Args:
        candidate: model or engine directory, or what is open already.
        reference: likewise; of the parent model, with dropped experts unselectable where a plan was applied.
        data: task data; without it both see random feeds at three shapes, one of them a single token.
        batch_size: examples that are run at once.
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how ONNX Runtime is to run the candidate; the reference is run on the CPU.
        tolerance: what is allowed; by default what ``tolerances`` says of the coarser model's number format.
        tolerances: by number format (`load_tolerances`).
        forced: the candidate with its routing as inputs, as `graph_passes.variants.cut` writes it; it is run with the
            choices of the reference's routers, so that all elements can be compared, and nothing flips.
        greedy_tokens: so many tokens decoders with a cache write to be compared; 0: none.
        on_progress: told of every batch, and of every token that decoders write.

    Raises:
        UserError: a directory is damaged or cannot be run here, or the two are not comparable.
    """
    with contextlib.ExitStack() as stack:
        mine = reference if isinstance(reference, Side) else Side.open(reference, threads, on_progress=on_progress)
        theirs = candidate if isinstance(candidate, Side) else Side.open(candidate, threads, execution, on_progress)
        stack.enter_context(mine.session)
        stack.enter_context(theirs.session)
        check_comparable(mine, theirs)
        precision = "as given"
        if tolerance is None:
            precision = max(mine.precision(), theirs.precision(), key=list(TOLERANCES).index)
            tolerance = tolerances[precision]
        routed = None
        if forced is not None and _is_forced_throughout(mine, theirs, forced):
            routed = stack.enter_context(open_session(forced.path, threads, execution)), forced
        comparison = _Comparison(mine, theirs, tolerance, routed)
        batches = batches_of(mine.session.inputs, mine.path, data, batch_size)
        for feeds, labels in counted(batches, "comparing outputs", count_batches(data, batch_size), on_progress):
            comparison.add(feeds, labels)
        report = comparison.report(data, precision)
        if execution.provider is not None:
            report = report.with_note(f"the candidate was computed by {execution}")
        prompts = prompts_of(_prompted(mine, data)) if greedy_tokens and has_cache(mine.session.inputs) else []
        if not prompts:
            return report
        greedy = compare_greedy(mine.session, theirs.session, prompts, greedy_tokens, on_progress)
        return dataclasses.replace(report, greedy=greedy)


def _prompted(reference: Side, data: Dataset | None) -> Feeds:
    """Feeds with the prompts that decoders go on from."""
    if data is not None:
        return data.first(PROMPTS).feeds
    return RandomFeeds.of(reference.session.inputs, reference.path).draw(PROMPTS, PROMPT_TOKENS, seed=0)


def _is_forced_throughout(reference: Side, candidate: Side, forced: ForcedModel) -> bool:
    """Whether nothing can flip in ``forced``, and the reference shows what its layers are to be told."""
    if not reference.observed:
        return False
    names = {layer.name for layer in forced.layers}
    shown = {block.name for block in reference.manifest.blocks if block.gates is not None}
    return names <= shown and names >= {block.name for block in candidate.manifest.blocks if block.gates is not None}


class _Comparison:
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
        self._accuracy = AccuracyTally()
        self._examples = 0

    def add(self, feeds: Feeds, labels: npt.NDArray[np.int64] | None) -> None:
        """Run one batch on both."""
        mine, theirs = (run_cast(side.session, feeds) for side in (self._reference, self._candidate))
        batch = len(next(iter(feeds.values())))
        clean_B = self._compare_layers(mine, theirs, np.ones(batch, dtype=np.bool_))
        for tally in self._outputs:
            tally.add(mine[tally.name], theirs[tally.name], clean_B)
        if self._routed is not None:
            self._compare_forced(feeds, mine, *self._routed)
        logits = self._logits(mine)
        if labels is not None and logits is not None:
            self._accuracy.add(mine[logits], theirs[logits], labels)
        self._examples += batch

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
            tally.add(compared, _per_token(clean_B, tokens), other.gates != 0)
            clean_B = clean_B & ~_per_example(compared.flipped, len(clean_B))
        return clean_B

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
        outputs = tuple(tally.report() for tally in self._outputs)
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
            notes=tuple(_NO_ROUTERS.format(name) for name in self._hidden),
        )


def _per_token(clean_B: Flags, tokens: int) -> Flags:
    """Each example's flag for each of its tokens; where tokens belong to no example, all of them for all."""
    if tokens % len(clean_B):
        return np.full(tokens, clean_B.all())
    return np.repeat(clean_B, tokens // len(clean_B))


def _per_example(flags_T: Flags, batch: int) -> Flags:
    if len(flags_T) % batch:
        return np.full(batch, flags_T.any())
    return np.asarray(flags_T.reshape(batch, -1).any(axis=1))
