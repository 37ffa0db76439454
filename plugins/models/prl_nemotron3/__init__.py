"""Nemotron-3 Nano, Super and Ultra."""
