"""`svgpipe train-autoencoder`: the residual encoder and the decoder."""
