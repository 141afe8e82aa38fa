"""`svgpipe train-autoencoder`: residual encoder and decoder."""
