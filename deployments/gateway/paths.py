"""Paths of the engine's OpenAI application that this gateway serves, and what they are for."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES, COUNT_TOKENS = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
MODELS = "/v1/models"  # answered by the gateway itself
GENERATE_PATHS = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)
POST_PATHS = (*GENERATE_PATHS, TOKENIZE, DETOKENIZE, COUNT_TOKENS)
