"""Which axis of a value is which: the proof that a form multiplies and sums along the axes that it seems to."""
