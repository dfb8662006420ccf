"""The interface to Hugging Face transformers: model structure, attention routing, masks, and checks of these."""
