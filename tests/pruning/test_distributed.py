import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.statistics import KEYS, Statistics
from pruning.calibrate import calibrate
from pruning.distributed import Team, team

CPU = torch.device("cpu")


def dataset(examples):
    return Dataset({"x": np.arange(examples)}, None, "data")


def batches(data, size):
    return [batch["x"].tolist() for batch in data.batches(size)]


@given(examples=st.integers(1, 40), batch_size=st.integers(1, 7), size=st.integers(1, 5))
def test_the_shares_are_all_batches_of_one_process_in_order(examples, batch_size, size):
    data = dataset(examples)
    whole = batches(data, batch_size)
    if len(whole) < size:
        return
    shares = [batches(Team(rank, size, CPU).share(data, batch_size), batch_size) for rank in range(size)]
    assert [batch for share in shares for batch in share] == whole
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_batches_are_refused():
    with pytest.raises(UserError) as caught:
        Team(0, 4, CPU).share(dataset(5), 2)
    assert caught.value.what == "5 examples are 3 batch(es) of 2, too few for 4 processes"
    assert caught.value.hint == "start fewer processes, or give a smaller --batch-size"


def test_without_torchrun_a_process_is_alone():
    with team() as us:
        assert (us.rank, us.size) == (0, 1)
        assert us.total(()) == ()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError) as caught, team():
        pass
    assert caught.value.what == "process 2 of this machine finds no GPU of its own, there are 2"
    assert caught.value.hint == "torchrun --nproc-per-node 2"


def torchrun(processes, *arguments):
    """``torchrun ... moe-edge calibrate ARGUMENTS``."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    main = "import sys; from cli.main import main; main(sys.argv[1:], verbs=['calibrate'])"
    command = [*start, "--no-python", sys.executable, "-c", main, "calibrate", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # else torchrun says that it set it
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_two_processes_give_what_one_gives(zoo, tmp_path):
    data, one, two = (tmp_path / name for name in ("data.npz", "one.safetensors", "two.safetensors"))
    ids = np.random.default_rng(0).integers(0, 128, (7, 6))
    mask = np.arange(6) >= np.array([[0], [3], [0], [1], [0], [0], [2]])
    np.savez(data, input_ids=ids, attention_mask=mask.astype(np.int64))
    checkpoint = zoo.checkpoint("deepseek_v3")
    done = torchrun(2, checkpoint, "--data", data, "-o", two, "--batch-size", 2, "--shard-size", 2)
    assert (done.returncode, done.stdout) == (0, f"{two}: 2 MoE layers, {mask.sum()} tokens each\n"), done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes: with more, float32 sums may come in another order
    try:
        single = calibrate(checkpoint, data, one, batch_size=2)
    finally:
        torch.set_num_threads(threads)
    together = Statistics.load(two)
    assert (together.model_sha256, together.data_sha256) == (single.model_sha256, single.data_sha256)
    for mine, theirs in zip(single.layers, together.layers, strict=True):
        assert (mine.name, mine.groups, mine.token_count) == (theirs.name, theirs.groups, theirs.token_count)
        assert mine.sums.keys() == theirs.sums.keys()
        for key in mine.sums:
            np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-12, atol=1e-12, err_msg=key)
            assert KEYS[key].largest is False or np.array_equal(mine[key], theirs[key])
    assert sorted(path.name for path in tmp_path.iterdir()) == [data.name, one.name, two.name]
