"""`svgpipe train-diffusion`: the diffusion transformer, from the cache alone."""
