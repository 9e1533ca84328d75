"""The op ``global_pool``."""
