"""What the networks say when they are asked for something that cannot be."""


class ModelError(ValueError):
    """A user's mistake about networks or weights: one line with what was got, what was wanted, the way out."""
