"""Files that a stranger can hand in, damaged in every way that a fixed seed makes up; see `__main__`."""
