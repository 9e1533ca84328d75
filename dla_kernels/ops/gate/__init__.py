"""The op ``gate``."""
