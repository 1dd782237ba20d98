"""The formats of published models, one file for each family."""
