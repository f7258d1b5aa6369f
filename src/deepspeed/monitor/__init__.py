"""Monitors: where the numbers of a training run are written."""
