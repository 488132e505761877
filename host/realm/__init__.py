"""Realm: tenants' WebAssembly guests drive one shared, continuously batched model."""

__version__ = "0.1.0"
