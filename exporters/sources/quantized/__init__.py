"""Weights that were quantized already, of checkpoints and files, with the codes that they hold."""
