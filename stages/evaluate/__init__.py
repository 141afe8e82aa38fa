"""`svgpipe sample-and-eval` and `eval-reconstruction`: latents, images, metrics."""
