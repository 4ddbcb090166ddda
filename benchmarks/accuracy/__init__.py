"""The accuracy table: every method on five real models."""
