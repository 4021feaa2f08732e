"""Fine-tuning of a trained student on a task with labels, or on pictures and captions, and what comes of it."""
