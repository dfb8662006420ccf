"""FASA on the paged cache of continuous batching: packed keys and the completion's state beside its pages."""
