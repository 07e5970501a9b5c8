"""Calibrate, rank, plan and apply: from a checkpoint and task data to a smaller checkpoint.

- ``calibrate``, with ``collect`` and ``observe``: what routers and experts do on data;
- ``criteria``: what each expert is worth; ``candidates``: the layers that are ranked by it;
- ``budget``: how many experts each layer keeps; ``options``: what was asked for;
- ``plan``, ``plan_on_data``, ``by_hand``: the ways to a plan, with ``merging`` instead of dropping;
- ``apply``: the plan carried out in memory; ``prune``: in a checkpoint, with ``stream`` from file to file;
- ``finetuning``: before a plan, or after it.
"""
