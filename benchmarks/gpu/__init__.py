"""The GPU table: correctness, speed beside torch, and what a profile says, from one command."""
