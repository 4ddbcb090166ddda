"""Models to quantize: Llama-family decoders and vision transformers, read from Hugging Face folders without torch."""
