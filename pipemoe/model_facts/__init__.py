"""What a model's config.json says: facts, what is refused, dimensions; the models known by name. No torch."""
