"""The language model that is trained: loading, quantisation, adapter; policy, reference and value in one module."""
