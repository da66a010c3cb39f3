"""The dense decoder: parameters, forward passes, loading and exporting of weights."""
