"""What a dataset's numbers say of its samples: neighbours, questions to the judge, table, selection."""
