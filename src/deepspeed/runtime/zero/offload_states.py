"""The documented names of ``deepspeed.runtime.zero.offload_states``."""

from __future__ import annotations

from ...engine.states import get_state_devices

__all__ = ["get_state_devices"]
