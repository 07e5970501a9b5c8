"""The proof: the original with the dropped experts unselectable (the oracle), and whether a result computes that."""
