"""Sampling responses: two engines behind one protocol, the worker actor, and the stream that keeps batches in flight."""
