"""What lies in a Hugging Face folder."""
