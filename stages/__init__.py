"""One file per job: typed inputs, a config section and an output directory in, a manifest out."""
