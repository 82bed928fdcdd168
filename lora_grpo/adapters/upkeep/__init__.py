"""The store's life: opened, archived, pruned, closed."""
