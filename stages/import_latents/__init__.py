"""`svgpipe import-latents`: latents that other programs computed, as a feature cache."""
