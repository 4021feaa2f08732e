"""Statistics of whole fields, computed with dask, kept in the cache: channels, PCA, codebooks, near-duplicates."""
