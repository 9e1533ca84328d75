"""The op ``light_attention``."""
