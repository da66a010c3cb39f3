"""Examples: reading and writing, tokenizing, packing."""
