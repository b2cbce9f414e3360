"""Images and recordings to what a model takes, in numpy: what its own processor does at the workstation."""
