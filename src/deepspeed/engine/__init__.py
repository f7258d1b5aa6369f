"""The training engine: a thin face that owns the accumulation boundary and the order of calls."""
