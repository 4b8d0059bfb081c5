"""Control by region and token: what editors make a model answer, and what else they change."""
