"""`pdray bench shapes`: the same load on several arrangements of workers, each served by `pdray serve`."""
