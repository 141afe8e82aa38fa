"""The suite for one CUDA GPU: `python -m tests.gpu`. Needs neither Ray nor a network."""
