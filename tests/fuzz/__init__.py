"""Damaged files for every reader: each is refused in one sentence, or read without harm."""
