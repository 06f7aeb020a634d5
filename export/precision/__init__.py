"""A certified float32 graph in other types: 16 bits, or quantised on real images."""
