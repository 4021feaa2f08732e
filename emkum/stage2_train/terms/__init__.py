"""The terms of the loss as modules: what each reads, learns and remembers, around the functions of objectives/."""
