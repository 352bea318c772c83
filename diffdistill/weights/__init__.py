"""Published weights of other projects, turned into our parameters; nothing that a file says is executed."""


class WeightsError(ValueError):
    """A file of weights that is absent, damaged, not the expected one, or names code; the message says so."""
