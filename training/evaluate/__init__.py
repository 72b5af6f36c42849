"""What an encoder is worth: `likewise evaluate` (docs/evaluation.md)."""
