"""What the forms are made of: projections, experts, branches and runs, and how outputs are weighed and summed."""
