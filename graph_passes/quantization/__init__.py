"""Fewer bits: for the weights of experts, for those outside the MoE layers, and for what int8 weights multiply."""
