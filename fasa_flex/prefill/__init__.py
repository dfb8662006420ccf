"""Sparse prefill by block masks: blocks of queries attend to the blocks of keys that an estimate ranks best."""
