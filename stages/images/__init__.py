"""Decoding, crops and tensors of images; sets and streams of images."""
