"""Stage 1: run the frozen encoder and the frozen teachers once, and write what they say into a cache."""
