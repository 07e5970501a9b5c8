"""What `runtime.verify` is made of: two sides, sums over batches, tolerances, the verdict, the search for a fault."""
