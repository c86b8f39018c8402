"""Adapters: Hugging Face decoder models as attend(layer, microbatch) / finish, and their checkpoints."""
