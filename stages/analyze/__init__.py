"""`svgpipe probe` and `svgpipe analyze`: properties of features and models."""
