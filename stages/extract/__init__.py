"""`svgpipe extract`: a shard set becomes a feature cache."""
