"""Nemotron-H: the limits of Mamba's time steps in config.json, which transformers 5.23 forgets.

It raises every time step to ``time_step_min``, but where one token follows a cache, so that it disagrees with itself
and with how the checkpoints were trained: https://github.com/huggingface/transformers/pull/48989.
"""

from typing import Any

from torch import nn


def adapt(mixer: Any) -> nn.Module:
    """The same mixer, which keeps to ``time_step_limit``: (0, inf) in all that is published."""
    mixer.time_step_limit = tuple(mixer.config.time_step_limit)
    adapted: nn.Module = mixer
    return adapted
