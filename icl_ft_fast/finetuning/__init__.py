"""Fine-tuning through the prefix tree and head that also score: `finetune()` and the types it takes.

settings: what can be set. data: files and texts to token ids with a loss mask. batches: the order of examples, and a
batch as one prefix tree. run: the run itself, from preparing to finishing. network: what is trained, and its loss.
optimizer: AdamW on float32 weights. lora: adapters. distillation: a teacher with documents in context. distributed:
several processes. checkpoint, trackers: files, and metrics elsewhere.
"""
