"""Examples: reading and writing them, tokenizing, packing."""
