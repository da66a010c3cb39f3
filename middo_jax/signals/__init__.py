"""From measurements to selected samples: neighbours, the judge's questions, the scores, the selection."""
