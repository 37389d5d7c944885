"""Whether a compiled program fits on its device, as XLA counts it. Knows nothing of networks."""

from __future__ import annotations

from typing import Any

import jax

from megajax.errors import DeviceError

__all__ = ["check_fits"]


def check_fits(compiled: jax.stages.Compiled, device: jax.Device | None = None) -> None:
    """Refuses a program that takes more memory than its device has left.

    Args:
        compiled: `jax.jit(f).lower(...).compile()`.
        device: where it runs; None takes the first device. One that does not tell how much memory
            it has, as the host's, is taken to have enough.

    Raises:
        DeviceError: it does not fit; what it takes, and what there is.

    Example:
        >>> check_fits(jax.jit(lambda x: x + 1).lower(1.0).compile())
    """
    device = jax.local_devices()[0] if device is None else device
    plan: Any = compiled.memory_analysis()
    stats = device.memory_stats() or {}
    if plan is None or "bytes_limit" not in stats:
        return
    # The arguments are there already, and are counted as in use.
    needed = plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed > free:
        held = plan.argument_size_in_bytes
        raise DeviceError(
            f"{device.device_kind} {device.id}: the program needs {_gib(needed)} beside its inputs "
            f"({_gib(held)}), and {_gib(free)} of {_gib(stats['bytes_limit'])} are free; "
            "a smaller batch size or population chunk needs less"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
