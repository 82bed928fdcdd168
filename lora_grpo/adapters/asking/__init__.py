"""What other processes ask: which versions there are, by what names, and what the run shall do."""
