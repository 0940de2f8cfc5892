"""The parts that models are made of. Each owns its weights: their names in a checkpoint, their shapes, their layout."""
