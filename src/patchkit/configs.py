"""Give a model a configuration of its own, so that no twin built from the same object changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from patchkit.journal import Journal

_SWITCHED = "_attn_implementation_internal"


@dataclass
class OwnConfig:
    """A configuration object and the copy that stands in for it while the model is patched.

    Attributes:
        original: The object the model had, possibly shared with other models.
        copy: What the model uses instead.
        before: The values both held at that moment.
    """

    original: PreTrainedConfig
    copy: PreTrainedConfig
    before: dict[str, Any]


def adopt(model: nn.Module, journal: Journal) -> list[OwnConfig]:
    """Replace the model's configuration, and every part of it, by a copy in all submodules."""
    memo: dict[int, Any] = {}
    copy.deepcopy(model.config, memo)
    adopted: dict[int, OwnConfig] = {}
    for name, module in model.named_modules():
        for attribute, value in list(module.__dict__.items()):
            if isinstance(value, PreTrainedConfig) and id(value) in memo:
                own = memo[id(value)]
                journal.set(module, attribute, own, label=name or "model")
                if id(value) not in adopted:
                    adopted[id(value)] = OwnConfig(value, own, copy.deepcopy(value.__dict__))
    return list(adopted.values())


def hand_back(configs: list[OwnConfig]) -> None:
    """Carry values that were changed on the copies over to the originals."""
    for config in configs:
        for key, value in config.copy.__dict__.items():
            changed = key not in config.before or config.before[key] != value
            if changed and key != _SWITCHED and not isinstance(value, PreTrainedConfig):
                config.original.__dict__[key] = value
