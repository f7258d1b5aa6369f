"""Checkpoints: fragments of named parameters' flat ranges, in safetensors, with one JSON index."""
