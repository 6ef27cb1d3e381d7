"""Variants side by side: capacity, forgetting, training tasks, cost."""
