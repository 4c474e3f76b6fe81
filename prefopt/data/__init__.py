"""Text in and out: prompts, preference data, records, and the check before training."""
