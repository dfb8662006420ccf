"""Errors of the types that Python has for them; each is a ValueError too, which callers of version 0.1 catch."""


class ArgumentTypeError(TypeError, ValueError):
    """An argument has the wrong type."""


class NotSupportedError(NotImplementedError, ValueError):
    """The request is well formed, but this method or device does not serve it."""


class StateError(RuntimeError, ValueError):
    """The call does not fit the state of the object, or of the machine."""
