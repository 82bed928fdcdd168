"""What a run says: to its file, to the terminal, to trackers, and as a picture."""
