"""Where states lie: the flat layout that all sharding derives from, and the arithmetic of model states."""
