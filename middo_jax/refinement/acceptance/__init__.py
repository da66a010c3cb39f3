"""Which rewrites are accepted: the checks of the table of gates, and what they compare with."""
