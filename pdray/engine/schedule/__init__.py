"""What each step computes, and what came of it."""
