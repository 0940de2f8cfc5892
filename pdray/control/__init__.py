"""Control logic, pure: time and messages go in, effects come out."""
