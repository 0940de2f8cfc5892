"""What lets the lanes of several ranks run the same steps."""
