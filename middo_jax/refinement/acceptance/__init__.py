"""Which rewrites are accepted: the checks of the gates, and the values with which they compare."""
