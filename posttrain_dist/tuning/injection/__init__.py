"""What LoRA and IA3 share: which layers are changed, `peft`'s layers, and the names of files."""
