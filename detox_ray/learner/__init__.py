"""Proximal policy optimisation on the adapter: pure tensor functions, the update, and the Ray Train loop."""
