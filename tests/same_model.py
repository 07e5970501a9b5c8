"""Whether two models in torch are the same."""

from collections.abc import Callable

import torch


def assert_same_model(found: torch.nn.Module, expected: torch.nn.Module, outputs: Callable[..., torch.Tensor]) -> None:
    """The same weights to the bit, and the same outputs but for rounding.

    Where weights lie in memory, and so the order in which a product sums, differs between two copies: on an AMD EPYC
    their outputs differ in the last bit, on an Intel Xeon they do not.
    """
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name].dtype, torch.equal(mine[name], tensor)) == (tensor.dtype, True), name
    with torch.no_grad():
        torch.testing.assert_close(outputs(found), outputs(expected))
