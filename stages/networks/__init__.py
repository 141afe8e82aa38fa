"""Loads and builds autoencoders and diffusion models; samples latents."""
