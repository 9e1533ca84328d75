"""One folder per op: schema and checks, reference, and one module per backend."""
