"""Our path inside other trainers: TRL's GRPOTrainer, and any `transformers.Trainer` by a callback."""
