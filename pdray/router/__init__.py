"""The router: takes requests, finds them workers, and turns tokens into text. asyncio, no Ray."""
