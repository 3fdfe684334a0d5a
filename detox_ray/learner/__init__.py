"""Proximal policy optimisation and fine-tuning of the adapter: pure tensor functions, updates, Ray Train loops."""
