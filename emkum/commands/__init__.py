"""Commands of the door that have a file of their own; emkum/cli.py adds them."""
