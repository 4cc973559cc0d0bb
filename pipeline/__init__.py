"""Fine-tune a text classifier with the same code on one process or many, publish it to the Hub, prove it."""
