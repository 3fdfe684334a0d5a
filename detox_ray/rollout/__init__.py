"""Sampling responses: two engines behind one protocol, the worker actor, the stream that keeps batches in flight."""
