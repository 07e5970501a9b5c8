"""Each expert picks its tokens, computes those, and adds them where they came from."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tests.foreign.exporters import dynamo, torchscript
from tests.foreign.foreign import Foreign
from tests.foreign.inputs import HALF_TOKENS, TOKENS
from tests.foreign.parts import EXPERTS, Branches, Mlp, SwiGlu, residual
from tests.foreign.routers import RENORMALISED, SIGMOID, SigmoidBias, SoftmaxTopK


class Mixtral(Branches):
    """transformers' Mixtral block before 5.0, its loop over all experts."""

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        out_TH = torch.zeros_like(x_TH)
        mask_EKT = nn.functional.one_hot(ids_TK, num_classes=EXPERTS).permute(2, 1, 0)
        for e in range(EXPERTS):
            idx, top_x = torch.where(mask_EKT[e])
            current_TH = self.experts[e](x_TH[None, top_x].reshape(-1, x_TH.shape[-1])) * weights_TK[top_x, idx, None]
            out_TH.index_add_(0, top_x, current_TH.to(x_TH.dtype))
        return out_TH


class DeepSeek(Branches):
    """DeepSeek-V3's own inference code: ``y[idx] += expert(x[idx]) * weights[idx, top, None]``."""

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        out_TH = torch.zeros_like(x_TH)
        for e in range(EXPERTS):
            idx, top = torch.where(ids_TK == e)
            out_TH[idx] += self.experts[e](x_TH[idx]) * weights_TK[idx, top, None]
        return out_TH


_nonzero = partial(Foreign, "nonzero")
_mixtral = partial(residual, lambda: Mixtral(SoftmaxTopK(), SwiGlu))
_deepseek = residual(lambda: DeepSeek(SigmoidBias(), Mlp), layers=1)
_functions = partial(torchscript, functions={SwiGlu})


def _half() -> nn.Module:
    return _mixtral(layers=2)().half()


NONZERO: Mapping[str, Foreign] = {
    "nonzero_mixtral": _nonzero(RENORMALISED, _mixtral(layers=1), TOKENS, dynamo),
    "nonzero_mixtral_torchscript": _nonzero(RENORMALISED, _mixtral(layers=2), TOKENS, torchscript, layers=2),
    "nonzero_mixtral_half": _nonzero(RENORMALISED, _half, HALF_TOKENS, torchscript, layers=2),
    "nonzero_mixtral_functions": _nonzero(RENORMALISED, _mixtral(layers=2), TOKENS, _functions, layers=2),
    "nonzero_deepseek": _nonzero(SIGMOID, _deepseek, TOKENS, dynamo),
}
