"""Worked examples of looking inside a model, as the README shows them."""
