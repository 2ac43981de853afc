"""Benchmarks per op and per model, and the record of a device. They import fastbert; nothing in it imports them."""
