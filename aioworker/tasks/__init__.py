"""Functions as tasks: registered, loaded, checked and called."""
