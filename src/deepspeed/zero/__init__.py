"""ZeRO: parameters, gradients and optimizer states sharded over data-parallel ranks."""
