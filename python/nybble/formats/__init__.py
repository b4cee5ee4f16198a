"""How compressed weights are written down: packing, and the configuration that names it."""
