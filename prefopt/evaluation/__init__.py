"""Is the tuned model better, why, and what did it forget: judged answers -> a report."""
