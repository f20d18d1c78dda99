"""Where examples come from, and how they become fixed-shape, resumable batches.

sources.load(config.data)           -> {split: Table}       texts, pairs, labels
text.encode(table, tokenizer, ...)  -> Encoded              token ids of all examples, end to end
batches.Batches(encoded, ...)       -> .at(step) -> arrays  packed rows by the plan of packing

dialog_sources.load(config.data)    -> {split: Dialogs}     prompts and answers, pairs of answers
dialog_text.encode(dialogs, ...)    -> Encoded              and which tokens are learned

image_sources.load(config.data)     -> {split: ImageTable}  images, still in their files, and labels
images.check(table, ...)            -> ImageTable           each image can be read
image_batches.ImageBatches(...)     -> .at(step) -> arrays  pixels, decoded ahead
"""
