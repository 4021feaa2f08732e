"""Well-known collections, and made-up ones, written as WebDataset tars."""
