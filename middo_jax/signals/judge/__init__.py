"""What the model is asked about its own training data, and how its answers are read."""
