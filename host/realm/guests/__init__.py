"""The guest runtime: WebAssembly guests as fibers, and the host functions they call."""
