"""`python -m edgepeft.cli`, for where scripts are not on the path."""

from . import main

main(prog_name="edgepeft")
