"""A graph tried on values that a reader chose: where tokens go is found out, in whatever ops it is spelt."""
