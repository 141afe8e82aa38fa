"""Loading and building autoencoders and diffusion models; drawing latents."""
