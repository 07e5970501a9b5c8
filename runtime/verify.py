"""Does a candidate compute what its reference computes? Knows that an MoE's routers may flip.

Element-wise error on an MoE is dominated by tokens that select other experts, so three things are looked at apart:
which experts are selected, and whether rounding explains each difference; the outputs of examples on which nothing
flipped; and measures over everything (cosine, KL, top-1 agreement, task accuracy).
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from moe_spec.cut import ForcedModel
from moe_spec.dataset import Dataset
from moe_spec.decoder import IDS, has_cache
from moe_spec.errors import UserError
from moe_spec.progress import Progress, counted, silent
from moe_spec.runner import Feeds
from runtime.backends import open_session
from runtime.execution import BY_DEFAULT, Execution
from runtime.inputs.random_feeds import RandomFeeds
from runtime.text.greedy import PROMPTS, compare_greedy, prompts_of
from runtime.verification.comparison import Comparison
from runtime.verification.report import ParityReport
from runtime.verification.sides import Side, batches_of, check_comparable, count_batches
from runtime.verification.tolerances import TOLERANCES, Tolerance

GREEDY_TOKENS = 16
PROMPT_TOKENS = 8
"""Of prompts that are drawn at random."""


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
        comparison = Comparison(mine, theirs, tolerance, routed)
        batches = batches_of(mine.session.inputs, mine.path, data, batch_size)
        for feeds, labels in counted(batches, "comparing outputs", count_batches(data, batch_size), on_progress):
            comparison.add(feeds, labels)
        report = comparison.report(data, precision)
        if execution.provider is not None:
            report = report.with_note(f"the candidate was computed by {execution}")
        if not greedy_tokens or not has_cache(mine.session.inputs):
            return report
        return _with_texts(report, mine, theirs, data, greedy_tokens, on_progress)


def _with_texts(
    report: ParityReport, mine: Side, theirs: Side, data: Dataset | None, tokens: int, on_progress: Progress
) -> ParityReport:
    """``report``, and how long both decoders write the same; or a note of why they write nothing."""
    takes_ids = any(spec.name == IDS for spec in mine.session.inputs)
    prompts = prompts_of(_prompted(mine, data)) if takes_ids else []
    if takes_ids and not prompts:
        return report
    try:
        greedy = compare_greedy(mine.session, theirs.session, prompts, tokens, on_progress)
    except UserError as error:  # what is measured already is not lost
        return report.with_note(f"no texts were compared: {error.what}")
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
