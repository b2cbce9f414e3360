"""Running a bundle as a device would, beside what it was made from, before it is put in place."""
