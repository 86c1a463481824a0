"""Training with TRL: data, routing, the recipes' trainer, LoRA and QAT."""
