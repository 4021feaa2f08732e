"""Data at rest: source tars, views of pictures, and the cache on disk, with numpy and without torch."""
