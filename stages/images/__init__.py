"""Bytes to RGB pixels, crops and tensors; sets and streams of images."""
