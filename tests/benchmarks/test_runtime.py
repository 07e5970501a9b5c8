import re

import pytest

from benchmarks.claims.flops import Flops
from benchmarks.node_times import products_of
from benchmarks.roofline import COPY, MULTIPLY, MULTIPLY_IN_ORT, PROBES, READ, Probe, Speeds, Step, speeds_of
from benchmarks.runtime import PARTS, costs, phase_table, steps
from runtime.bench import DECODE, PREFILL, bench, row_of
from runtime.measuring.memory import Alone
from tests.models_table import EXPERTS, HIDDEN, TOP_K, VOCABULARY, WIDTH, mixtral, vmoe
from tests.runtime import tiny

LAYERS, HEADS = 2, 4
EXPERT = 3 * HIDDEN * WIDTH
ATTENTION = 3 * HIDDEN * HIDDEN  # queries and output, and keys and values of half as many heads
STEP = Step(Flops(total=100, experts=80), dense_bytes=10, expert_bytes=5, tokens=1, experts=8, top_k=4)


def test_every_part_can_be_asked_for():
    assert list(PARTS) == ["decoder", "vmoe", "smollm2"]


@pytest.mark.parametrize(
    ("tokens", "kept", "reading", "computing"),
    [
        (1, 8, 10 + 4 * 5, 100),  # K experts of one token
        (128, 8, 10 + 8 * 5, 100),  # all of them
        (128, 2, 10 + 2 * 5, 60),  # no token has more than two
        (1, 1, 10 + 5, 40),
    ],
)
def test_a_step_reads_and_computes_what_its_tokens_can_reach(tokens, kept, reading, computing):
    step = Step(STEP.flops, STEP.dense_bytes, STEP.expert_bytes, tokens, STEP.experts, STEP.top_k)
    bound = step.bound(kept, Speeds(bandwidth=1.0, peak=2.0))
    assert (bound.reading_ms, bound.computing_ms) == pytest.approx((1e3 * reading, 500 * computing))


def test_a_decoder_reads_its_weights_and_its_cache():
    prompt, one = (steps(mixtral())[phase] for phase in (PREFILL, DECODE))
    norms, router, head = (2 * LAYERS + 1) * HIDDEN, LAYERS * EXPERTS * HIDDEN, VOCABULARY * HIDDEN
    weights = LAYERS * ATTENTION + norms + router + head
    assert prompt.dense_bytes == 4 * weights
    assert one.dense_bytes == 4 * (weights + LAYERS * 128 * HIDDEN)  # keys and values, half as many heads
    assert prompt.expert_bytes == one.expert_bytes == 4 * LAYERS * EXPERT
    assert one.flops.experts == 2 * LAYERS * TOP_K * EXPERT == prompt.flops.experts // 128


def test_an_embedding_that_is_the_head_too_is_read_whole():
    own = mixtral()
    own.config.tie_word_embeddings = True
    tied = type(own)(own.config)
    assert tied.num_parameters() < own.num_parameters()
    assert steps(tied)[DECODE].dense_bytes == steps(own)[DECODE].dense_bytes


def test_an_image_is_one_step():
    (step,) = steps(vmoe()).values()
    assert (step.tokens, step.experts, step.top_k) == (4, EXPERTS, TOP_K)


def test_probes_take_turns_with_models(tmp_path):
    probes = [Probe(name) for name in PROBES]
    rows = bench([tiny.write(tmp_path / "model")], (1,), repeats=2, warmup=0, rivals=probes)
    assert [row.model for row in rows[1:]] == [READ, COPY, MULTIPLY, MULTIPLY_IN_ORT]
    assert [len(probe.times) for probe in probes] == [2] * len(PROBES)
    assert speeds_of({probe.name: min(probe.times) for probe in probes}).bandwidth > 1e8


def test_tables_compare_with_the_quickest_of_theirs():
    names = {"moe-edge, 25%": 2.0, "transformers, default": 6.0, "transformers, batched_mm": 5.0, "torch": 8.0}
    rows = [row_of(name, 1, [time], Alone(4.0, 3 << 20), 2_000_000, phase=DECODE) for name, time in names.items()]
    text = phase_table(rows, STEP, {"moe-edge, 25%": 2}, Speeds(bandwidth=20e3, peak=100e3))
    assert "| moe-edge, 25% | 2.00 | 2.00 | 2.50 | 1.00 | memory | 50% |" in text.splitlines()
    assert "| torch | 8.00 | 8.00 | 0.62 | 1.50 | memory | 19% |" in text.splitlines()
    assert (
        "(batched_mm) 5.00 ms, 2.50 times as\nlong; by its default implementation of experts\n6.00 ms, 3.00 times"
        in text
    )
    assert costs(rows).splitlines()[-1] == "| torch | 4 | 3 | 2.0 |"


def test_products_are_told_from_other_nodes(tmp_path):
    model = tiny.write(tmp_path / "model") / "model.onnx"
    said = products_of(model, {"x": tiny.examples(2)}, threads=1)
    assert re.fullmatch(r"\d+% of the time in its \d+ nodes goes to the \d+ products of matrices", said)
