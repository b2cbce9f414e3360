"""Every gradient rule against central differences, against PyTorch, and in random graphs."""
