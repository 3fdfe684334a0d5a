"""A run's metrics for the programs people look at them with. Numbers only: never a text."""
