"""The op ``cell``."""
