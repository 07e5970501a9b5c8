"""Loops over the experts that were hit: a tracer keeps those of its example, and the others are gone."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from tests.foreign.decoders import block
from tests.foreign.exporters import torchscript
from tests.foreign.foreign import Foreign
from tests.foreign.inputs import HIDDEN_STATES, TWO_TOKENS
from tests.foreign.parts import Branches, Mlp, residual
from tests.foreign.routers import RENORMALISED, SoftmaxTopK


class HitExperts(Branches):
    """``for e in ids.unique()``, as YOLO-Master and many more had it before they exported."""

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        out_TH = torch.zeros_like(x_TH)
        for e in ids_TK.unique().tolist():
            gate_T = torch.where(ids_TK == e, weights_TK, 0.0).sum(dim=-1)
            out_TH = out_TH + gate_T.unsqueeze(-1) * self.experts[e](x_TH)
        return out_TH


_unique = residual(lambda: HitExperts(SoftmaxTopK(), Mlp), layers=1)
_eager = partial(block, "mixtral", "eager")

LOST: Mapping[str, Foreign] = {
    "lost_unique": Foreign("masked_loop", RENORMALISED, _unique, TWO_TOKENS, torchscript, branches=3),
    "lost_mixtral": Foreign("nonzero", RENORMALISED, _eager, HIDDEN_STATES, torchscript, branches=7),
}
