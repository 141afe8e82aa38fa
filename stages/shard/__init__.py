"""`svgpipe shard` and `svgpipe index`: image folders or tars to a shard set."""
