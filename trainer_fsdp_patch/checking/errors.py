"""What `check` raises before it trains."""

from __future__ import annotations

from trainer_fsdp_patch.errors import TrainerFsdpPatchError


class CheckError(TrainerFsdpPatchError):
    """`check` cannot run as it was asked, or not on this machine; no set-up was trained."""
