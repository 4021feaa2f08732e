"""Measuring a student: retrieval between pictures and captions, among pictures, among texts."""
