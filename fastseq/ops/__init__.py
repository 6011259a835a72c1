"""Operators registered with torch: schema, shapes, autograd. One file an op."""
