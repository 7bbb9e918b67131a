"""What the layers of one KV store share while the model runs over them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ForwardPass:
    """What the layers of one store share during a forward pass.

    Attributes:
        step: Counts the passes.
        valid: `[B, T]` bool, False for the padding among the new tokens of this pass; None for
            none.
        until: Columns that are known to come, for which slots are allocated at once.
        horizon: Steps to come, this one included, that must launch the same kernels as this one.
        recording: Whether launches are recorded for replay instead of run: what is handed out
            must then have the shape of the whole allocation.
    """

    step: int = 0
    valid: Tensor | None = None
    until: int = 0
    horizon: int = 1
    recording: bool = False
    _placed: dict[torch.device, Tensor] = field(default_factory=dict)
    _behind: dict[torch.device, Tensor] = field(default_factory=dict)

    def begin(self, valid: Tensor | None) -> None:
        """Open the next pass."""
        self.step += 1
        self.valid = valid
        self._placed.clear()
        self._behind.clear()

    def valid_on(self, device: torch.device) -> Tensor | None:
        """Return `valid` on a device, where the layers share it."""
        if self.valid is not None and device not in self._placed:
            self._placed[device] = self.valid.to(device, torch.bool)
        return self._placed.get(device)

    def behind_on(self, device: torch.device) -> Tensor | None:
        """Return, `[B, T]` int32, how many valid tokens are behind each; None without padding."""
        valid = self.valid_on(device)
        if valid is not None and device not in self._behind:
            behind = valid.sum(-1, keepdim=True) - valid.cumsum(-1)
            self._behind[device] = behind.to(torch.int32)
        return self._behind.get(device)
