"""Families of networks: each file maps one kind of checkpoint on disk to a backbone, strictly."""
