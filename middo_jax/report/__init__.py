"""What a run's folder says: a page (`build`), where it stands (`status`), one sample's family (`lineage`)."""
