"""A model under FASA: `enable`, the handle that it returns, and its statistics."""
