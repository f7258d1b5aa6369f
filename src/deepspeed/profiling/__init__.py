"""Profiling: wall clock, throughput and floating-point operations."""
