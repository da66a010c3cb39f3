"""Reads a run's folder: makes its page (`build`), its state (`status`), a sample's ancestry (`lineage`)."""
