"""Caches that keep packed keys beside keys and values, on the device (FASA-C) or in host memory (FASA-M)."""
