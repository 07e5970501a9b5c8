"""ONNX to ONNX: read MoE blocks into one record, prune the record, write the form that a target wants.

``optimize``, ``calibrate`` and ``describe`` (for `moe-edge inspect`) are what others call. The way through, downwards:

- ``simplify``: what other tools write becomes what readers expect;
- ``readers`` and ``routers``: recognise MoE blocks, and their routers, in any form;
- ``unreachable``: which experts no input can choose;
- ``settle``: what is to happen, and why it cannot; ``rewrite``: it happens; ``result``: what the manifest says of it;
- ``record``: the block between readers and writers, and what a plan makes of it;
- ``quantization``: fewer bits, for experts and for the rest;
- ``writers``: emit one form;
- ``variants``: the files beside model.onnx, routers shown or given;
- ``proof``: the result computes what the original does;
- ``casts``: halves instead of float32;
- ``graph`` and ``weights``: what all of them stand on.
"""
