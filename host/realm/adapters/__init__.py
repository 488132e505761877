"""LoRA adapters as PEFT saves them: what they say, whether they fit a model, and their weights for a runner."""
