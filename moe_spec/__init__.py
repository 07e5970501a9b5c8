"""The vocabulary of moe-edge: axes, artifacts, errors. Needs numpy and safetensors, nothing else.

Axes, used in array names and docstrings everywhere:

====  =====================================================
T     tokens
L     MoE layers
E     experts of the model at hand
K     experts that a token selects (top-k)
H     hidden width
F     expert width
E'    experts kept (written ``Ek`` in names)
====  =====================================================

An *expert id* is always the id in the model at hand. ``keep`` lists ids of the parent model, ascending, so survivor
``j`` of a pruned layer is expert ``keep[j]`` of its parent. A *router* is everything from the hidden state to ids and
weights. *Experts* are the routed FFNs; a shared expert is no expert here, it is never pruned.
"""
