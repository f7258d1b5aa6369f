"""Activation checkpointing: recompute in backward what forward does not keep."""
