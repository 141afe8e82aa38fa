"""`svgpipe shard` and `svgpipe index`: folders or tars of images become a shard set."""
