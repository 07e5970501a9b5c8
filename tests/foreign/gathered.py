"""Each token's experts picked by indexing the weights, as people write it in torch: ``W[ids]``."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tests.foreign.exporters import dynamo, torchscript
from tests.foreign.foreign import Foreign
from tests.foreign.inputs import HIDDEN, TOKENS
from tests.foreign.parts import EXPERTS, WIDTH, residual
from tests.foreign.routers import RENORMALISED, SoftmaxTopK


class Indexed(nn.Module):
    """A copy of two matrices for each slot of each token."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.up = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        middle_TK1F = nn.functional.gelu(x_TH[:, None, None] @ self.up[ids_TK])
        out_TKH = (middle_TK1F @ self.down[ids_TK]).squeeze(2)
        return (out_TKH * weights_TK[..., None]).sum(dim=1)


_gathered = partial(Foreign, "gather", RENORMALISED, residual(lambda: Indexed(SoftmaxTopK()), layers=2), TOKENS)

GATHERED: Mapping[str, Foreign] = {
    "gather_indexed": _gathered(dynamo, layers=2),
    "gather_indexed_torchscript": _gathered(torchscript, layers=2),
}
