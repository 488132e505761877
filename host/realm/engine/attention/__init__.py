"""Attention over paged KV: one module per implementation."""
