"""`svgpipe extract`: shard set to feature cache."""
