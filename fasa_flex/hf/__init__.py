"""Hugging Face transformers as FASA meets it: model structure, attention routing, masks, and checks of these."""
