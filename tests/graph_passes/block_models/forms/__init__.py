"""One file a form: each writes the experts of a block behind its router and gives their sum (T, H)."""
