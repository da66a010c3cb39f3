"""The questions to the model about its own training data, and how its answers are read."""
