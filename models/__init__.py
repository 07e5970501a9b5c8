"""MoE architectures that transformers lacks, and the table of families that it has."""
