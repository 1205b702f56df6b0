"""The frozen base model: Megatron's GPTModel with torch-native parts."""
