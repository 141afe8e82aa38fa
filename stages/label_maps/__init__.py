"""`svgpipe extract-maps`: masks and depth maps beside images become label maps of their centre crops."""
