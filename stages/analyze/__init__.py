"""`svgpipe probe` and `svgpipe analyze`: what features and models are like."""
