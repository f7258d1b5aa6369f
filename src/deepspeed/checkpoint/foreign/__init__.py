"""Checkpoints that other programs wrote, seen as this package sees its own."""
