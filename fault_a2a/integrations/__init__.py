"""Where fault_a2a meets other systems: one module or folder each, and what they share."""
