"""What a student is trained on: one pure function a file, from tensors to a scalar loss."""
