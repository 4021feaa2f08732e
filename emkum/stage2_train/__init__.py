"""CACHE -> STUDENT: read the cached inputs and targets, train the student's blocks, evaluate them."""
