"""How many experts each layer keeps: what is asked for, what it costs, and how it is spent on ranked layers."""
