"""Merge experts instead of dropping them: who belongs together, how neurons are aligned, and the weighted mean."""
