"""Applying a recipe to a program: what each leaf is stored as, packing it, the plan and the report."""
