"""The terms of the loss as modules: what each reads of a batch, learns and remembers, around the pure functions of
objectives/."""
