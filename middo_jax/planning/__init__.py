"""Plans a run for chips that are not there: does it fit, how long does it take, what limits it."""
