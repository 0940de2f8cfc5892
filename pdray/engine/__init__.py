"""One device's inference engine: block pool, scheduler, runner. Knows no Ray, no HTTP, no peers."""
