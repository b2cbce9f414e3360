"""Checkpoints whose weights are quantized already, read with the codes that they hold."""
