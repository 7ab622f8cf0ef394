"""What vLLM's CPU build lacks for DeepSeek's models, put in through its public extension points."""
