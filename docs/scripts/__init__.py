"""Scripts that write pages of the documentation; ``python -m docs.scripts`` runs all of them."""
