"""Kimi-K2, Kimi-K2.5 and Kimi-K2.7."""
