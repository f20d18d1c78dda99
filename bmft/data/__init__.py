"""Where examples come from, and how they become fixed-shape, resumable batches.

sources.load(config.data)           -> {split: Table}       texts, pairs, labels
text.encode(table, tokenizer, ...)  -> Encoded              token ids of all examples, end to end
batches.Batches(encoded, ...)       -> .at(step) -> arrays  packed rows by the plan of packing
"""
