"""The dense decoder: declaration, forward passes, weights in and out, generation."""
