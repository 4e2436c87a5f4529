"""Starts the other two packages: the `pixloom` command, launcher files, run configurations."""
