"""The headline claims of the four papers that moe-edge began with, put to the test."""

from collections.abc import Mapping

from benchmarks.claims import one_expert, router_norm, seer, uncurl
from benchmarks.claims.claim import Claim

CLAIMS: Mapping[str, Claim] = {
    "router-norm": router_norm.CLAIM,
    "task-specific": one_expert.CLAIM,
    "uncurl": uncurl.CLAIM,
    "seer": seer.CLAIM,
}
"""By what the method is called on the command line, or nearly so."""
