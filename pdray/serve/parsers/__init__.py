"""Model outputs taken apart: thoughts, text and tool calls. Pure state machines, fed with text as it comes."""
