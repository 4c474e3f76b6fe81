"""What becomes of a tuned model: adapters that servers take, GGUF files, and the Hub."""
