"""Experts with buffers of a limited capacity: tokens are dispatched into them and combined, the rest is dropped."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tests.foreign.exporters import dynamo, torchscript
from tests.foreign.foreign import Foreign
from tests.foreign.inputs import HIDDEN, SEQUENCES, TOKENS
from tests.foreign.parts import EXPERTS, TOP_K, WIDTH, Mlp, residual
from tests.foreign.routers import NOT_RENORMALISED, TOP_1, TOP_2


class VMoE(nn.Module):
    """google-research/vmoe: softmax, top-k, first choices before second ones; gates not renormalised.

    Groups are the examples; of each, 5/4 of an expert's even share fits into it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.b1 = nn.Parameter(torch.empty(EXPERTS, 1, 1, WIDTH))
        self.w2 = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
        self.b2 = nn.Parameter(torch.empty(EXPERTS, 1, 1, HIDDEN))

    def forward(self, x_GSH: Tensor) -> Tensor:
        groups, size, _ = x_GSH.shape
        capacity = (5 * TOP_K * size + 4 * EXPERTS - 1) // (4 * EXPERTS)
        gates_GSE = torch.softmax(self.gate(x_GSH), dim=-1)
        ids_GSK = torch.topk(gates_GSE, TOP_K, dim=-1)[1]
        chosen_GKSE = nn.functional.one_hot(ids_GSK, EXPERTS).transpose(1, 2)
        chosen = chosen_GKSE.reshape(groups, TOP_K * size, EXPERTS)
        place = torch.cumsum(chosen, dim=1) * chosen - 1
        place_GSE = place.reshape(groups, TOP_K, size, EXPERTS).amax(dim=1)
        dispatch_GSEC = (place_GSE.unsqueeze(-1) == torch.arange(capacity)).to(x_GSH.dtype)
        combine_GSEC = torch.einsum("gse,gsec->gsec", gates_GSE, dispatch_GSEC)
        inside_EGCH = torch.einsum("gsec,gsh->egch", dispatch_GSEC, x_GSH)
        hidden_EGCF = nn.functional.gelu(torch.einsum("egch,ehf->egcf", inside_EGCH, self.w1) + self.b1)
        out_EGCH = torch.einsum("egcf,efh->egch", hidden_EGCF, self.w2) + self.b2
        return torch.einsum("gsec,egch->gsh", combine_GSEC, out_EGCH)


class Switch(nn.Module):
    """Switch Transformers' router in mesh-tensorflow: top-1 by argmax; who comes late to an expert is not computed."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.wi = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.wo = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
        self._capacity = capacity

    def forward(self, x_TH: Tensor) -> Tensor:
        scores_TE = torch.softmax(self.router(x_TH), dim=-1)
        gate_T, id_T = scores_TE.max(dim=-1)
        mask_TE = nn.functional.one_hot(id_T, EXPERTS)
        place_TE = torch.cumsum(mask_TE, dim=0) * mask_TE
        mask_TE = mask_TE * (place_TE <= self._capacity)
        place_T = (place_TE * mask_TE).sum(dim=-1)
        gate_T = gate_T * mask_TE.sum(dim=-1)
        slot_TC = (place_T.unsqueeze(-1) == torch.arange(1, self._capacity + 1)).to(x_TH.dtype)
        combine_TEC = gate_T[:, None, None] * mask_TE.to(x_TH.dtype).unsqueeze(-1) * slot_TC.unsqueeze(1)
        dispatch_TEC = combine_TEC.bool().to(x_TH.dtype)
        inside_ECH = torch.einsum("tec,th->ech", dispatch_TEC, x_TH)
        out_ECH = torch.bmm(torch.relu(torch.bmm(inside_ECH, self.wi)), self.wo)
        return torch.einsum("tec,ech->th", combine_TEC, out_ECH)


class GShard(nn.Module):
    """GShard's top-2 gating as fairscale and DeepSpeed have it, without noise; one module an expert."""

    def __init__(self, expert: type[nn.Module], capacity: int) -> None:
        super().__init__()
        self.wg = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        self._capacity = capacity

    def forward(self, x_TH: Tensor) -> Tensor:
        combine_TEC = self._gating(self.wg(x_TH))
        dispatch_TEC = combine_TEC.bool().to(x_TH.dtype)
        inside_ECH = torch.einsum("tec,th->ech", dispatch_TEC, x_TH)
        chunks = inside_ECH.chunk(EXPERTS, dim=0)
        out_ECH = torch.cat([expert(chunk) for chunk, expert in zip(chunks, self.experts, strict=True)], dim=0)
        return torch.einsum("tec,ech->th", combine_TEC, out_ECH)

    def _gating(self, logits_TE: Tensor) -> Tensor:
        gates_TE = torch.softmax(logits_TE, dim=1)
        first_TE = nn.functional.one_hot(torch.argmax(gates_TE, dim=1), EXPERTS)
        others_TE = logits_TE.masked_fill(first_TE.bool(), float("-inf"))
        second_TE = nn.functional.one_hot(torch.argmax(others_TE, dim=1), EXPERTS)
        places1_TE = torch.cumsum(first_TE, dim=0) - 1
        places2_TE = torch.cumsum(second_TE, dim=0) - 1 + first_TE.sum(dim=0, keepdim=True)
        first_TE = first_TE * torch.lt(places1_TE, self._capacity)
        second_TE = second_TE * torch.lt(places2_TE, self._capacity)
        gate1_T, gate2_T = (gates_TE * first_TE).sum(dim=1), (gates_TE * second_TE).sum(dim=1)
        total_T = torch.clamp(gate1_T + gate2_T, min=torch.finfo(gates_TE.dtype).eps)
        combine1_TEC = self._combine(gate1_T / total_T, first_TE, places1_TE)
        return combine1_TEC + self._combine(gate2_T / total_T, second_TE, places2_TE)

    def _combine(self, gate_T: Tensor, mask_TE: Tensor, places_TE: Tensor) -> Tensor:
        slot_TC = nn.functional.one_hot((places_TE * mask_TE).sum(dim=1), self._capacity).to(gate_T.dtype)
        return torch.einsum("te,tc->tec", gate_T.unsqueeze(1) * mask_TE, slot_TC)


_dispatch = partial(Foreign, "dispatch")
_vmoe = partial(residual, VMoE)
_switch = partial(residual, lambda: Switch(capacity=4))
_gshard = residual(lambda: GShard(Mlp, capacity=8), layers=2)
_LIMITED = f"{NOT_RENORMALISED}, capacity"

DISPATCH: Mapping[str, Foreign] = {
    "dispatch_vmoe": _dispatch(_LIMITED, _vmoe(layers=1), SEQUENCES, dynamo),
    "dispatch_vmoe_torchscript": _dispatch(_LIMITED, _vmoe(layers=2), SEQUENCES, torchscript, layers=2),
    "dispatch_switch": _dispatch(TOP_1, _switch(layers=1), TOKENS, dynamo, top_k=1),
    "dispatch_switch_torchscript": _dispatch(TOP_1, _switch(layers=2), TOKENS, torchscript, layers=2, top_k=1),
    "dispatch_gshard": _dispatch(TOP_2, _gshard, TOKENS, torchscript, layers=2),
}
