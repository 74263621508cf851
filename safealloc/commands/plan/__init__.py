"""What a pool will hold for a model: from the model's architecture, its checkpoint and how vLLM deploys it."""
