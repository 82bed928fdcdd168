"""What lies on disk, and how it appears and vanishes whole."""
