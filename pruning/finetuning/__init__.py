"""Fine-tuning around pruning: recover what a plan cost, prune while training, or make routers content with fewer."""
