"""The gates on pairs of an original and a rewrite whose worth is known: texts, labels, measurements, ROC."""
